"""The errors of the mesh. The class decides the fate of the message.

    TaskmeshError
        TransientError              worker: retry with backoff        HTTP 503
            BrokerUnavailable
            DatabaseUnavailable
            ObjectStoreUnavailable
        PermanentError              worker: the task fails            HTTP 422
            ContractViolation       the message is dead-lettered
        TaskCancelled               worker: the task ends cancelled
        ConflictError                                                 HTTP 409
        NotFound                                                      HTTP 404

A foreign exception is translated once, in the module that owns the library, with `raise X(...) from error`.
Messages name what failed, which id, and what to do; never a payload, an address or a secret.
"""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar


class TaskmeshError(Exception):
    """Root of everything the mesh raises on purpose."""

    code: ClassVar[str] = "internal"
    """Stable and machine-readable; the last part of a problem document's `type`."""


class TransientError(TaskmeshError):
    """May pass by itself: the attempt is retried under the task's policy.

    Args:
        retry_after: Wait at least this long before the next attempt; None leaves it to the policy.
    """

    code = "unavailable"

    def __init__(self, message: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BrokerUnavailable(TransientError):
    """RabbitMQ cannot be reached, or closed the connection."""

    code = "broker_unavailable"


class DatabaseUnavailable(TransientError):
    """PostgreSQL cannot be reached, is starting, or has no free connection."""

    code = "database_unavailable"


class ObjectStoreUnavailable(TransientError):
    """The object store cannot be reached or answered with a server error."""

    code = "object_store_unavailable"


class PermanentError(TaskmeshError):
    """Will fail again however often it is tried: the task fails at once."""

    code = "rejected"


class ContractViolation(PermanentError):
    """The payload does not fit the contract of its type; the message is dead-lettered."""

    code = "contract_violation"


class TaskCancelled(TaskmeshError):
    """Somebody has cancelled the running task: what it wrote is undone, and it is not tried again."""

    code = "cancelled"


class ConflictError(TaskmeshError):
    """Contradicts something that is stored already."""

    code = "conflict"


class NotFound(TaskmeshError):
    """There is no such thing, or the caller may not know of it."""

    code = "not_found"
