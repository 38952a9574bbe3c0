"""What the gateway counts and times of tasks. Called after the commit: what was rolled back has not happened.

A process that is killed between its commit and these lines leaves a gap of one batch in the counters, and one that is
killed between the commit and the acknowledgement counts nothing twice: what is told again is no news to the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Row

from gateway.dead_letters.letter import DeadLetter, Diagnosis
from gateway.new_tasks import NewTask
from gateway.progress import Step
from gateway.schedules import Fire, Outcome
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.metrics import catalogue

NO_TRACE: Final = ""
"""In place of a traceparent: what is current is the trace of a request or a batch, and not the task's."""


def count_accepted(new: Iterable[NewTask]) -> None:
    """Count tasks that the gateway has accepted, and that most of them are queued with that."""
    for (type_name, service, state), count in Counter((task.type, task.service, task.state) for task in new).items():
        catalogue.TASKS_ACCEPTED.add(count, type=type_name, service=service)
        if state is TaskState.QUEUED:
            catalogue.TASK_TRANSITIONS.add(count, type=type_name, service=service, state=state.value)


def count_steps(steps: Iterable[Step]) -> None:
    """Count steps that the ledger has taken, and record how long they took."""
    counts: Counter[tuple[str, str, TaskState, str | None]] = Counter()
    for step in steps:
        counts[step.type, step.service, step.event.state, step.code] += 1
        _time(step)
    for (type_name, service, state, code), count in counts.items():
        # A task waits for its time before it is on its way: that is no step of the mesh.
        if state is not TaskState.SCHEDULED:
            catalogue.TASK_TRANSITIONS.add(count, type=type_name, service=service, state=state.value, code=code)


def count_cancelled(task: Row[Any]) -> None:
    """Count a task that was taken back before it left, and so was ended by the gateway itself."""
    of_task = {"type": task.type, "service": task.service, "state": TaskState.CANCELLED.value}
    catalogue.TASK_TRANSITIONS.add(**of_task)
    if task.queued_at is not None:
        catalogue.TASK_DURATION.record((task.finished_at - task.queued_at).total_seconds(), NO_TRACE, **of_task)


def _time(step: Step) -> None:
    """Record how long the task has waited, how long its attempt has run, and how long all of it took."""
    trace, of_task = step.event.traceparent or NO_TRACE, {"type": step.type, "service": step.service}
    state = step.event.state.value
    if (wait_seconds := step.wait_seconds) is not None:
        catalogue.TASK_WAIT_DURATION.record(wait_seconds, trace, **of_task)
    if (run_seconds := step.run_seconds) is not None:
        catalogue.TASK_RUN_DURATION.record(run_seconds, trace, **of_task, state=state)
    if (total_seconds := step.total_seconds) is not None:
        catalogue.TASK_DURATION.record(total_seconds, trace, **of_task, state=state)


def time_lag(steps: Iterable[Step]) -> None:
    """Record how late the ledger has heard of what happened; now is the time of the commit."""
    now = datetime.now(UTC)
    for step in steps:
        catalogue.PROJECTOR_LAG.record((now - step.event.at).total_seconds(), step.event.traceparent or NO_TRACE)


def count_fires(fires: Iterable[Fire]) -> None:
    """Count fires of schedules and the tasks that they made, and record how late these are at their commit: now."""
    now = datetime.now(UTC)
    for fire in fires:
        catalogue.SCHEDULE_FIRES.add(outcome=fire.outcome.value)
        if fire.outcome is Outcome.SUBMITTED and fire.type is not None:
            of_task = {"type": fire.type, "service": fire.type.partition(".")[0]}
            catalogue.SCHEDULE_LATENESS.record((now - fire.fire_at).total_seconds())
            catalogue.TASKS_ACCEPTED.add(**of_task)
            catalogue.TASK_TRANSITIONS.add(**of_task, state=TaskState.QUEUED.value)


def count_letters(stored: Iterable[tuple[DeadLetter, Diagnosis]]) -> None:
    """Count dead letters that are kept now and were not before."""
    for letter, diagnosis in stored:
        catalogue.DEAD_LETTERS_STORED.add(service=letter.service, reason=letter.reason, code=diagnosis.code)
