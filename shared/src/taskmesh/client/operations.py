"""What a caller can ask of tasks and types, as operations without I/O (exchange.py)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypedDict, Unpack, cast
from urllib.parse import quote
from uuid import UUID

from taskmesh.client.exchange import Deadline, Operation, Patience, Pause, Request, call
from taskmesh.client.paging import collect, emit_pages
from taskmesh.client.problems import WaitTimeout
from taskmesh.client.results import Task, TaskPage, TaskType, TaskTypes
from taskmesh.contracts import Command
from taskmesh.contracts.lifecycle import TaskState

LONGEST_HOLD_SECONDS = 60
"""The longest `Prefer: wait` that the gateway grants; longer waits are several of them."""

EARLY_SECONDS = 0.5

LARGEST_PAGE = 200
TREE_POLL_SECONDS = 0.25

Seconds: TypeAlias = float | timedelta
"""A length of time; a bare number is seconds."""


class TaskOptions(TypedDict, total=False):
    """What may be said of one task beside its type and payload."""

    run_at: datetime | None
    """Not before this moment (with its time zone); not together with `delay`."""
    delay: Seconds | None
    """Not before this long from now, by the gateway's clock."""
    expires_at: datetime | None
    """A task that has not started by then never does; its state becomes `expired`."""
    priority: int | None
    """0 to 9, sent with the message: RabbitMQ 4 prefers higher ones, RabbitMQ 3 ignores it in quorum queues."""
    tags: Sequence[str]
    """At most 20, to find the task by."""


class SubmitOptions(TaskOptions, total=False):
    """What may be said of one submission."""

    idempotency_key: str | None
    """The caller's own name for this submission: the same key gives the same task for as long as the gateway keeps it.
    None makes one that is kept over the retries of this call only."""
    wait: Seconds | None
    """Wait this long for the task to finish; when it does not, the task is returned as it is."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One task of a batch."""

    type: str
    payload: Mapping[str, Any]
    run_at: datetime | None = None
    delay: Seconds | None = None
    expires_at: datetime | None = None
    priority: int | None = None
    tags: Sequence[str] = ()

    @classmethod
    def of(cls, command: Command, **options: Unpack[TaskOptions]) -> Submission:
        """The submission of a contract."""
        return cls(type=command.type_name, payload=command.payload(), **options)

    def body(self) -> dict[str, Any]:
        """The JSON form that the gateway reads."""
        if self.run_at is not None and self.delay is not None:
            raise ValueError("give run_at or delay, not both")
        fields = {
            "type": self.type,
            "payload": dict(self.payload),
            "run_at": None if self.run_at is None else instant(self.run_at),
            "delay_seconds": None if self.delay is None else in_seconds(self.delay),
            "expires_at": None if self.expires_at is None else instant(self.expires_at),
            "priority": self.priority,
            "tags": list(self.tags) or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


class Filter(TypedDict, total=False):
    """Which tasks to list; what is left out, or None, does not narrow the list."""

    type: str | None
    state: TaskState | str | None
    tag: str | None
    root_id: UUID | str | None
    """All tasks of one request: the root itself and everything it led to."""
    parent_id: UUID | str | None
    schedule_id: UUID | str | None
    created_after: datetime | None
    created_before: datetime | None


def submit(
    task: str | Command, payload: Mapping[str, Any] | None, options: SubmitOptions, patience: Patience
) -> Operation[Task]:
    """Submit one task; see `Taskmesh.submit`."""
    said = options.copy()
    idempotency_key = said.pop("idempotency_key", None)
    hold = said.pop("wait", None)
    deadline = Deadline(0.0 if hold is None else in_seconds(hold))
    type_name, content = content_of(task, payload)
    answer = yield from call(
        Request(
            method="POST",
            path="/v1/tasks",
            headers={**key_header(idempotency_key), **prefer_wait(deadline)},
            body=Submission(type=type_name, payload=content, **cast("TaskOptions", said)).body(),
            repeatable=True,
            hold_seconds=hold_seconds(deadline),
        ),
        patience,
    )
    return (yield from _hold_on(Task.model_validate_json(answer.body), deadline, patience))


def submit_many(
    tasks: Iterable[Submission | Command], idempotency_key: str | None, patience: Patience
) -> Operation[tuple[Task, ...]]:
    """Submit a batch, all or nothing; see `Taskmesh.submit_many`."""
    submissions = [task if isinstance(task, Submission) else Submission.of(task) for task in tasks]
    answer = yield from call(
        Request(
            method="POST",
            path="/v1/tasks:batchCreate",
            headers=key_header(idempotency_key),
            body={"tasks": [each.body() for each in submissions]},
            repeatable=True,
        ),
        patience,
    )
    return TaskPage.model_validate_json(answer.body).items


def content_of(task: str | Command, payload: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]]:
    """The type and the payload of a contract, or of a type given with its payload."""
    if isinstance(task, str):
        return task, {} if payload is None else payload
    if payload is not None:
        raise TypeError("a contract is its own payload")
    return task.type_name, task.payload()


def get(task_id: UUID | str, patience: Patience) -> Operation[Task]:
    """The task as it is now."""
    return (yield from _get(task_id, Deadline(0.0), patience))


def wait(task_id: UUID | str, timeout: Seconds, patience: Patience) -> Operation[Task]:
    """The finished task; see `Taskmesh.wait`."""
    seconds = in_seconds(timeout)
    deadline = Deadline(seconds)
    task = yield from _get(task_id, deadline, patience)
    task = yield from _hold_on(task, deadline, patience)
    if not task.finished:
        raise WaitTimeout(task, seconds)
    return task


def wait_tree(root_id: UUID | str, timeout: Seconds, patience: Patience) -> Operation[tuple[Task, ...]]:
    """All tasks of one request, once all are finished; see `Taskmesh.wait_tree`."""
    deadline = Deadline(in_seconds(timeout))
    yield from wait(root_id, timeout, patience)
    while True:
        # A task's children reach the ledger together with its outcome: a tree that is all finished is complete.
        tasks = yield from collect(list_tasks(Filter(root_id=root_id), None, LARGEST_PAGE, patience))
        unfinished = [task for task in tasks if not task.finished]
        if not unfinished:
            return tuple(sorted(tasks, key=lambda task: (task.parent_id is not None, task.created_at)))
        if not deadline.remaining:
            raise WaitTimeout(unfinished[0], deadline.seconds)
        yield Pause(TREE_POLL_SECONDS)


def list_tasks(wanted: Filter, limit: int | None, page_size: int, patience: Patience) -> Operation[None]:
    """Emit tasks, newest first."""
    yield from emit_pages("/v1/tasks", _query(wanted), TaskPage, limit=limit, page_size=page_size, patience=patience)


def list_types(patience: Patience) -> Operation[tuple[TaskType, ...]]:
    """Every task type that services have announced."""
    answer = yield from call(Request(method="GET", path="/v1/types", repeatable=True), patience)
    return TaskTypes.model_validate_json(answer.body).items


def get_type(name: str, patience: Patience) -> Operation[TaskType]:
    """One task type with its schema."""
    path = f"/v1/types/{quote(name, safe='')}"
    answer = yield from call(Request(method="GET", path=path, repeatable=True), patience)
    return TaskType.model_validate_json(answer.body)


def in_seconds(length: Seconds) -> float:
    """A length of time as seconds."""
    return length.total_seconds() if isinstance(length, timedelta) else float(length)


def instant(moment: datetime) -> str:
    """A moment in RFC 3339; one without a time zone is refused, because it would be guessed."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _get(task_id: UUID | str, deadline: Deadline, patience: Patience) -> Operation[Task]:
    request = Request(
        method="GET",
        path=f"/v1/tasks/{quote(str(task_id), safe='')}",
        headers=prefer_wait(deadline),
        repeatable=True,
        hold_seconds=hold_seconds(deadline),
    )
    answer = yield from call(request, patience)
    return Task.model_validate_json(answer.body)


def _hold_on(task: Task, deadline: Deadline, patience: Patience) -> Operation[Task]:
    """Ask again until the task is finished or the time is over."""
    while not task.finished and (hold := hold_seconds(deadline)):
        held = Deadline(hold)
        task = yield from _get(task.id, deadline, patience)
        if not task.finished and held.remaining > EARLY_SECONDS:
            # A gateway that is stopping answers at once; asking again at once would only be a load.
            yield Pause(EARLY_SECONDS)
    return task


def hold_seconds(deadline: Deadline) -> int:
    """How long the gateway may be asked to hold the next answer back; 0 when the time is over."""
    # Whole seconds, as `Prefer: wait` is (RFC 7240); under half a second is not worth another request.
    return min(round(deadline.remaining), LONGEST_HOLD_SECONDS)


def prefer_wait(deadline: Deadline) -> dict[str, str]:
    """The header that asks for it."""
    seconds = hold_seconds(deadline)
    return {"Prefer": f"wait={seconds}"} if seconds else {}


def key_header(idempotency_key: str | None) -> dict[str, str]:
    """The header that makes a request safe to repeat, under the caller's key or one made for this call."""
    return {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}


def _query(wanted: Filter) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, instant(value) if isinstance(value, datetime) else str(value))
        for name, value in wanted.items()
        if value is not None
    )
