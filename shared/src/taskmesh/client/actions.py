"""What a caller can do to a task that exists, as operations without I/O (exchange.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from uuid import UUID

from taskmesh.client.exchange import Deadline, Operation, Patience, Pause, Request, call
from taskmesh.client.operations import EARLY_SECONDS, Seconds, hold_seconds, in_seconds, key_header, prefer_wait
from taskmesh.client.results import Cancelling, Explanation, Task
from taskmesh.contracts.lifecycle import TaskState


def cancel(
    task_id: UUID | str, *, reason: str | None, force: bool, wait: Seconds | None, patience: Patience
) -> Operation[Cancelling]:
    """Cancel a task; see `Taskmesh.cancel`."""
    deadline = Deadline(0.0 if wait is None else in_seconds(wait))
    body = {"reason": reason, "force": force or None}
    request = {name: value for name, value in body.items() if value is not None}
    answer = yield from _cancel(task_id, request, deadline, patience)
    while not answer.settled and (hold := hold_seconds(deadline)):
        held = Deadline(hold)
        # Asked again, it changes nothing.
        answer = _as_first_asked((yield from _cancel(task_id, request, deadline, patience)))
        if not answer.settled and held.remaining > EARLY_SECONDS:
            yield Pause(EARLY_SECONDS)
    return answer


def _cancel(
    task_id: UUID | str, body: Mapping[str, Any], deadline: Deadline, patience: Patience
) -> Operation[Cancelling]:
    request = Request(
        method="POST",
        path=f"{_path(task_id)}:cancel",
        headers=prefer_wait(deadline),
        body=body,
        repeatable=True,
        hold_seconds=hold_seconds(deadline),
    )
    answer = yield from call(request, patience)
    return Cancelling.model_validate_json(answer.body)


def _as_first_asked(answer: Cancelling) -> Cancelling:
    """What ended since the first request did not end before it."""
    if answer.outcome != "already_finished":
        return answer
    outcome = "cancelled" if answer.task.state is TaskState.CANCELLED else "too_late"
    return answer.model_copy(update={"outcome": outcome})


def retry(
    task_id: UUID | str, payload: Mapping[str, Any] | None, idempotency_key: str | None, patience: Patience
) -> Operation[Task]:
    """Try a task again; see `Taskmesh.retry`."""
    request = Request(
        method="POST",
        path=f"{_path(task_id)}:retry",
        headers=key_header(idempotency_key),
        body={} if payload is None else {"payload": dict(payload)},
        repeatable=True,
    )
    answer = yield from call(request, patience)
    return Task.model_validate_json(answer.body)


def explain(task_id: UUID | str, patience: Patience) -> Operation[Explanation]:
    """Why the task is not done."""
    answer = yield from call(Request(method="GET", path=f"{_path(task_id)}:explain", repeatable=True), patience)
    return Explanation.model_validate_json(answer.body)


def _path(task_id: UUID | str) -> str:
    return f"/v1/tasks/{quote(str(task_id), safe='')}"
