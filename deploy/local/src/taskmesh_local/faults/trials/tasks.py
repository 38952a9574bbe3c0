"""What the trial worker does."""

from __future__ import annotations

import os
import signal
import time
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from taskmesh.errors import PermanentError, TransientError
from taskmesh.worker import MeshTask, WorkerApp
from taskmesh_local.faults.trials import contracts

app = WorkerApp("trials")

# A campaign may kill the process of one task several times, beside what the task does to itself.
OFTEN = 15
HANG_SECONDS = 30.0


@app.task(contracts.Record, max_retries=OFTEN)
def record(self: MeshTask, command: contracts.Record) -> None:
    """Leave the effect, then work: whoever dies meanwhile has written and not committed."""
    leave(self.session, self.task_id)
    time.sleep(command.work_ms / 1000)


@app.task(contracts.Follow, max_retries=OFTEN)
def follow(self: MeshTask, command: contracts.Follow) -> None:
    """Send first, then write: neither may come about without the other."""
    for _ in range(command.commands):
        self.send(contracts.Record())
    if command.emit:
        self.emit(contracts.Recorded())
    leave(self.session, self.task_id)


@app.task(contracts.Recorded, max_retries=OFTEN)
def on_recorded(self: MeshTask, event: contracts.Recorded) -> None:  # noqa: ARG001 - it says nothing
    """Leave the listener's own effect."""
    leave(self.session, self.task_id)


@app.task(contracts.Steps, max_retries=OFTEN, transaction="last")
def steps(self: MeshTask, command: contracts.Steps) -> None:
    """Commit a step that is safe to repeat, work outside any transaction, and leave the effect."""
    with self.transaction() as session:
        session.execute(
            text("insert into steps (task_id) values (:task_id) on conflict do nothing"), {"task_id": self.task_id}
        )
    time.sleep(command.work_ms / 1000)
    leave(self.session, self.task_id)


@app.task(contracts.Stumble, max_retries=OFTEN, retry_backoff_max=2, soft_time_limit=2, time_limit=4)
def stumble(self: MeshTask, command: contracts.Stumble) -> None:
    """Leave the effect, but end badly as often as told."""
    leave(self.session, self.task_id)
    if _run(self) <= command.runs:
        match command.way:
            case "error":
                raise TransientError("not yet")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(HANG_SECONDS)
            case "stuck":
                # The signal of the soft limit does not reach it.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                time.sleep(HANG_SECONDS)


@app.task(contracts.Refuse)
def refuse(self: MeshTask, command: contracts.Refuse) -> None:  # noqa: ARG001 - it says nothing
    """Write, and fail.

    Raises:
        PermanentError: Always.
    """
    leave(self.session, self.task_id)
    raise PermanentError("refused, as it was told to")


@app.task(contracts.Poison, max_retries=1)
def poison(self: MeshTask, command: contracts.Poison) -> None:  # noqa: ARG001 - it says nothing
    """Write, and kill the process."""
    leave(self.session, self.task_id)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(session: Session, task_id: UUID) -> None:
    """Leave the effect of one run; nothing but the inbox keeps a second run from leaving another."""
    session.execute(text("insert into effects (task_id) values (:task_id)"), {"task_id": task_id})


def _run(task: MeshTask) -> int:
    """Counts the task's runs from 1, the lost ones too."""
    with task.transaction() as session:
        statement = text(
            "insert into runs (task_id, count) values (:task_id, 1)"
            " on conflict (task_id) do update set count = runs.count + 1 returning count"
        )
        return int(session.execute(statement, {"task_id": task.task_id}).scalar_one())
