"""`python -m taskmesh.verify.harness FOLDER`: forks workers that meet faults where their messages ask for them.

The faults are put into the library here, in the forked process and its pool, so the library itself has no hooks for
them. What runs is otherwise the service's own role, from its own `__main__`. Only Celery and the library are loaded
before the fork: they take most of a worker's start, of which there are four for each type.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from taskmesh.verify.journal import HEADER, Fault, Journal, Step

PRELOADED = (
    # The first, because it tells Celery what a SIGTERM means.
    "taskmesh.worker.roles",
    "taskmesh.worker",
    "taskmesh.worker.consumer",
    "celery.apps.worker",
    "celery.concurrency.prefork",
    "kombu.transport.pyamqp",
)

MEET_SECONDS = 20.0
"""How long a copy waits at its last commit for the other one to begin."""

TOGETHER_SECONDS = 1.0
"""How long it then waits on, so that the other does all that it can do beside it."""

POLL_SECONDS = 0.02

_delivery: ContextVar[tuple[str, str] | None] = ContextVar("taskmesh_verify_delivery", default=None)
"""The fault that the running task is to meet, and the task's id."""

_settling: ContextVar[bool] = ContextVar("taskmesh_verify_settling", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A worker to be started; a line of JSON on standard input, which the pid answers on standard output."""

    package: str
    journal: str
    log: str
    environment: dict[str, str]

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def main() -> None:
    """Fork a worker for each order, until the verifier ends; the workers end with this process."""
    for module in PRELOADED:
        importlib.import_module(module)
    alive, held = os.pipe()
    workers: list[int] = []
    while line := sys.stdin.readline():
        order = Order(**json.loads(line))
        workers = [pid for pid in workers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        pid = os.fork()
        if pid == 0:
            os.close(held)
            work(order, alive)
            return
        workers.append(pid)
        print(pid, flush=True)  # noqa: T201 - the answer
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            # Its pool, too; unless it has had no time yet to lead a group.
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def work(order: Order, alive: int) -> None:
    """Be the service's worker, in a session of its own."""
    os.setsid()
    random.seed()
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard, replacement in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(replacement, standard)
    os.environ.clear()
    os.environ.update(order.environment)
    threading.Thread(target=_end_with_the_harness, args=[alive], daemon=True).start()
    install(Journal(Path(order.journal)))
    sys.argv = [order.package, "worker"]
    runpy.run_module(order.package, run_name="__main__", alter_sys=True)


def _end_with_the_harness(alive: int) -> None:
    """If the harness itself is killed: it holds the other end of this pipe, and nobody writes to it."""
    os.read(alive, 1)
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

    from celery import signals

    signals.task_prerun.connect(begin, weak=False)
    signals.task_postrun.connect(end, weak=False)


def _watch_acknowledgements(journal: Journal) -> None:
    """On Celery's own class, so that what the library's subclass of it does does not matter."""
    from celery.worker.request import Request

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
    """The last commit of a task is its unit's, inside of its settling."""
    from taskmesh.worker.unit import Unit

    settle, commit = Unit.settle, Unit.commit

    def settling(self: Unit, *args: Any, **kwargs: Any) -> None:
        before = _settling.set(True)
        try:
            settle(self, *args, **kwargs)
        finally:
            _settling.reset(before)

    def committing(self: Unit, connection: Connection) -> None:
        if _settling.get():
            _strike(journal)
        commit(self, connection)

    Unit.settle = settling  # type: ignore[method-assign]
    Unit.commit = committing  # type: ignore[method-assign]


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
