"""`python -m taskmesh.verify.harness JOURNAL PACKAGE ROLE`: a worker that meets faults where its messages ask for them.

The faults are put into the library here, in this process and in those that it forks, so the library itself has no hooks
for them. What runs is otherwise the service's own role, from its own `__main__`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from celery import signals
from celery.worker.request import Request

from taskmesh.verify.journal import HEADER, Fault, Journal, Step
from taskmesh.worker.unit import TaskSession, Unit

MEET_SECONDS = 20.0
"""How long a copy waits at its last commit for the other one to begin."""

TOGETHER_SECONDS = 1.0
"""How long it then waits on, so that the other does all that it can do beside it."""

POLL_SECONDS = 0.02

_delivery: ContextVar[tuple[str, str] | None] = ContextVar("taskmesh_verify_delivery", default=None)
"""The fault that the running task is to meet, and the task's id."""

_settling: ContextVar[bool] = ContextVar("taskmesh_verify_settling", default=False)


def main() -> None:
    """Run a role of the package, watched."""
    journal, package, role = sys.argv[1:4]
    threading.Thread(target=_end_with_the_verifier, daemon=True).start()
    install(Journal(Path(journal)))
    sys.argv = [package, role]
    runpy.run_module(package, run_name="__main__", alter_sys=True)


def _end_with_the_verifier() -> None:
    """Standard input is a pipe whose other end the verifier holds: it ends, however the verifier does."""
    while os.read(0, 1):
        pass
    # The session's leader is this process: its pool goes with it.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def install(journal: Journal) -> None:
    """Have deliveries journaled, and faults met; changes the library in this process."""
    _watch_runs(journal)
    _watch_acknowledgements(journal)
    _meet_faults(journal)


def _watch_runs(journal: Journal) -> None:
    def begin(task_id: str, task: Any, **_: Any) -> None:
        _delivery.set(((task.request.headers or {}).get(HEADER, ""), task_id))
        journal.write(Step.BEGUN, task_id)

    def end(task_id: str, **_: Any) -> None:
        _delivery.set(None)
        journal.write(Step.ENDED, task_id)

    signals.task_prerun.connect(begin, weak=False)
    signals.task_postrun.connect(end, weak=False)


def _watch_acknowledgements(journal: Journal) -> None:
    """On Celery's own class, so that what the library's subclass of it does does not matter."""
    acknowledge, reject = Request.acknowledge, Request.reject

    def acknowledged(self: Any) -> None:
        news = not self.acknowledged
        acknowledge(self)
        if news:
            journal.write(Step.ACKNOWLEDGED, self.id)

    def rejected(self: Any, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - Celery's signature
        news = not self.acknowledged
        reject(self, requeue=requeue)
        if news and not requeue:
            journal.write(Step.PARKED, self.id)

    Request.acknowledge, Request.reject = acknowledged, rejected


def _meet_faults(journal: Journal) -> None:
    """The last commit of a task is the one commit of a task's session inside of its unit's settling."""
    settle, commit = Unit.settle, TaskSession.commit

    def settling(self: Unit, *args: Any, **kwargs: Any) -> None:
        before = _settling.set(True)
        try:
            settle(self, *args, **kwargs)
        finally:
            _settling.reset(before)

    def committing(self: TaskSession) -> None:
        if _settling.get():
            _strike(journal)
        commit(self)

    Unit.settle = settling  # type: ignore[method-assign]
    TaskSession.commit = committing  # type: ignore[method-assign]


def _strike(journal: Journal) -> None:
    fault, task_id = _delivery.get() or ("", "")
    match fault:
        case Fault.KILL if not journal.count(task_id)[Step.KILLED]:
            journal.write(Step.KILLED, task_id)
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.MEET:
            _meet(journal, task_id)


def _meet(journal: Journal, task_id: str) -> None:
    end = time.monotonic() + MEET_SECONDS
    while time.monotonic() < end:
        steps = journal.count(task_id)
        if steps[Step.MET]:
            return
        if steps[Step.BEGUN] - steps[Step.ENDED] > 1:
            journal.write(Step.MET, task_id)
            time.sleep(TOGETHER_SECONDS)
            return
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
