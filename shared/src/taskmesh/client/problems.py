"""What can go wrong between a caller and the gateway.

    ClientError
        NotConfigured               an environment variable is missing
        GatewayUnreachable          no answer, however often it was tried within the time allowed
        WaitTimeout                 the task goes on; only the waiting is over
        TaskmeshProblem             the gateway answered with a problem document (RFC 9457)
            Unauthenticated                 401
            Forbidden                       403
            NoSuchResource                  404
                UnknownType                     names the nearest types
            Conflict                        409
                IdempotencyConflict             the key was used before, with another body
            InvalidRequest                  400, 422
                PayloadRefused                  the payload does not fit the contract of its type
            PayloadTooLarge                 413
            TooManyRequests                 429
            GatewayUnavailable              502, 503, 504
            GatewayFault                    any other 5xx

`TaskmeshProblem.code` is stable; `detail` is for people and may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from taskmesh.client.results import Task


class ClientError(Exception):
    """Root of everything the client raises on purpose."""


class NotConfigured(ClientError):
    """The environment does not say where the gateway is, or who is asking."""


class GatewayUnreachable(ClientError):
    """The gateway gave no answer within the time allowed; a submission may or may not have been accepted.

    To be sure of a submission, repeat it under the same idempotency key.
    """


class WaitTimeout(ClientError):
    """The task was not finished within the time allowed, and goes on.

    Args:
        task: The task as it last was.
    """

    def __init__(self, task: Task, seconds: float) -> None:
        super().__init__(f"task {task.id} is still {task.state} after {seconds:g} s")
        self.task = task


class FieldError(BaseModel):
    """One wrong place in a request."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pointer: str = ""
    """JSON pointer (RFC 6901) into the request's body, such as `/payload/lines/0/unit_price`."""
    detail: str = ""


class ProblemDocument(BaseModel):
    """The body of an answer of type `application/problem+json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: int
    code: str = "unknown"
    title: str = ""
    detail: str = ""
    instance: str | None = None
    trace_id: str | None = None
    errors: tuple[FieldError, ...] = ()
    nearest: tuple[str, ...] = ()


class TaskmeshProblem(ClientError):
    """The gateway refused the request, and said why."""

    def __init__(self, document: ProblemDocument, *, retry_after_seconds: float | None = None) -> None:
        self.document = document
        self.retry_after_seconds = retry_after_seconds
        super().__init__(str(self))

    @property
    def status(self) -> int:
        return self.document.status

    @property
    def code(self) -> str:
        """The stable name of the problem, such as `contract_violation`."""
        return self.document.code

    @property
    def detail(self) -> str:
        return self.document.detail or self.document.title

    @property
    def errors(self) -> tuple[FieldError, ...]:
        """Every wrong place in the request; empty when the problem is not about the body."""
        return self.document.errors

    @property
    def trace_id(self) -> str | None:
        return self.document.trace_id

    def __str__(self) -> str:
        places = "; ".join(f"{error.pointer}: {error.detail}" for error in self.errors)
        return f"{self.status} {self.code}: {self.detail}" + (f" ({places})" if places else "")


class Unauthenticated(TaskmeshProblem):
    """The API key is missing, wrong or revoked."""


class Forbidden(TaskmeshProblem):
    """The API key lacks the scope."""


class NoSuchResource(TaskmeshProblem):
    """There is no such task, type or schedule, or this API key may not see it."""


class UnknownType(NoSuchResource):
    """No service has announced the task type."""

    @property
    def nearest(self) -> tuple[str, ...]:
        """Known types with similar names, best first."""
        return self.document.nearest


class Conflict(TaskmeshProblem):
    """The request contradicts what is stored, such as a schedule of the same name."""


class IdempotencyConflict(Conflict):
    """The idempotency key was used before, with another body."""


class InvalidRequest(TaskmeshProblem):
    """The request itself is wrong; `errors` says where."""


class PayloadRefused(InvalidRequest):
    """The payload does not fit the contract of its type; `errors` says where."""


class PayloadTooLarge(TaskmeshProblem):
    """The body exceeds the gateway's limit; put large things into the object store and send their reference."""


class TooManyRequests(TaskmeshProblem):
    """The caller is over its rate, and was so until the time allowed was over."""


class GatewayUnavailable(TaskmeshProblem):
    """The gateway, or its database, is away; nothing was half done."""


class GatewayFault(TaskmeshProblem):
    """The gateway failed; its operators find the reason under `trace_id`."""


BY_CODE: dict[str, type[TaskmeshProblem]] = {
    "unknown_type": UnknownType,
    "contract_violation": PayloadRefused,
    "idempotency_conflict": IdempotencyConflict,
}
BY_STATUS: dict[int, type[TaskmeshProblem]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NoSuchResource,
    409: Conflict,
    413: PayloadTooLarge,
    422: InvalidRequest,
    429: TooManyRequests,
    502: GatewayUnavailable,
    503: GatewayUnavailable,
    504: GatewayUnavailable,
}


def problem(
    status: int, body: bytes, headers: httpx.Headers, *, retry_after_seconds: float | None = None
) -> TaskmeshProblem:
    """The exception for an answer that is not a success; also for one that a proxy in between has written."""
    document = _document(status, body, headers)
    fallback = GatewayFault if status >= httpx.codes.INTERNAL_SERVER_ERROR else TaskmeshProblem
    kind = BY_CODE.get(document.code) or BY_STATUS.get(status, fallback)
    return kind(document, retry_after_seconds=retry_after_seconds)


def _document(status: int, body: bytes, headers: httpx.Headers) -> ProblemDocument:
    if headers.get("content-type", "").partition(";")[0].strip() == "application/problem+json":
        try:
            fields: dict[str, Any] = ProblemDocument.model_validate_json(body).model_dump()
            # The status line is what the retry was decided on; a document may not contradict it.
            return ProblemDocument.model_validate({**fields, "status": status})
        except ValidationError:
            pass
    reason = httpx.codes.get_reason_phrase(status) or "unexpected answer"
    return ProblemDocument(
        status=status,
        title=reason,
        detail=f"{reason}: the answer is no problem document, so it may not come from the gateway",
    )
