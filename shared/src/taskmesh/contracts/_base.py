"""What every contract has: a type, a version, and a strict shape.

Contracts are the published language of the mesh. They import nothing but Pydantic, so any program may use them.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

# One string, five uses: contract type = Celery task name = routing key = ledger type = span attribute.
# RabbitMQ limits a routing key to 255 bytes; the first word is the owning service.
TYPE_PATTERN = re.compile(r"[a-z][a-z0-9-]*(\.[a-z][a-z0-9_-]*){1,5}")
TYPE_MAX_LENGTH = 200


class Part(BaseModel):
    """A piece of a contract: frozen, and refusing fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Contract(Part):
    """A message of the mesh, declared as `class IssueInvoice(Command, type="billing.invoice.issue")`."""

    type_name: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def __init_subclass__(cls, *, type: str = "", version: int = 1, **kwargs: Any) -> None:  # noqa: A002 - it reads well
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, type: str = "", version: int = 1, **kwargs: Any) -> None:  # noqa: A002
        super().__pydantic_init_subclass__(**kwargs)
        if not type:
            return
        if not TYPE_PATTERN.fullmatch(type) or len(type) > TYPE_MAX_LENGTH:
            raise TypeError(f"contract type {type!r} must read like 'billing.invoice.issue'")
        cls.type_name = type
        cls.version = version

    def payload(self) -> dict[str, Any]:
        """The JSON form that travels."""
        return self.model_dump(mode="json")


class Command(Contract):
    """Asks the one service that owns the type to do something: `<service>.<noun>.<verb>`."""


class Event(Contract):
    """States what has happened, to whoever listens: `<service>.<noun>.<past participle>`."""
