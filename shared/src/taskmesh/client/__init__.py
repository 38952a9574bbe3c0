"""The Python client: submit work to the mesh, and follow it.

`Taskmesh` for ordinary code, `AsyncTaskmesh` for async code; both carry out the same operations.
"""

from taskmesh.client.asynchronous import AsyncTaskmesh
from taskmesh.client.blocking import Taskmesh
from taskmesh.client.dead_letters import (
    BulkDiscard,
    BulkReplay,
    DeadLetter,
    DeadLetterDetail,
    DeadLetterGroup,
    Replayed,
)
from taskmesh.client.operations import Submission
from taskmesh.client.problems import (
    ClientError,
    Conflict,
    FieldError,
    Forbidden,
    GatewayFault,
    GatewayUnavailable,
    GatewayUnreachable,
    IdempotencyConflict,
    InvalidRequest,
    NoSuchResource,
    NotConfigured,
    PayloadRefused,
    PayloadTooLarge,
    TaskmeshProblem,
    TooManyRequests,
    Unauthenticated,
    UnknownType,
    WaitTimeout,
)
from taskmesh.client.results import (
    Cancelling,
    Explanation,
    Schedule,
    Service,
    StateChange,
    Task,
    TaskError,
    TaskType,
)
from taskmesh.contracts.lifecycle import TaskState

__all__ = [
    "AsyncTaskmesh",
    "BulkDiscard",
    "BulkReplay",
    "Cancelling",
    "ClientError",
    "Conflict",
    "DeadLetter",
    "DeadLetterDetail",
    "DeadLetterGroup",
    "Explanation",
    "FieldError",
    "Forbidden",
    "GatewayFault",
    "GatewayUnavailable",
    "GatewayUnreachable",
    "IdempotencyConflict",
    "InvalidRequest",
    "NoSuchResource",
    "NotConfigured",
    "PayloadRefused",
    "PayloadTooLarge",
    "Replayed",
    "Schedule",
    "Service",
    "StateChange",
    "Submission",
    "Task",
    "TaskError",
    "TaskState",
    "TaskType",
    "Taskmesh",
    "TaskmeshProblem",
    "TooManyRequests",
    "Unauthenticated",
    "UnknownType",
    "WaitTimeout",
]
