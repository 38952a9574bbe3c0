"""The orders service with tasks that lose what they run in, and that wait for a test's word.

A task writes each of its starts into a file of its own, which no rollback and no kill undoes: so a test counts the runs
of a task, and not what its attempts say of themselves.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from celery.exceptions import Ignore, Reject
from celery.signals import worker_ready
from sqlalchemy import text

from orders import app, record
from taskmesh.errors import TransientError
from taskmesh.worker import MeshTask, main

FOLDER = Path(os.environ["TASKMESH_HEALTH_DIR"])
POLL_SECONDS = 0.01


def begin(task: MeshTask) -> int:
    """Write this start down; returns how many there were before."""
    trail = FOLDER / f"{task.task_id}.starts"
    before = len(trail.read_text().splitlines()) if trail.exists() else 0
    with trail.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    return before


def wait_for(name: str) -> None:
    """Wait until the test, or another task, has made the file."""
    while not (FOLDER / name).exists():
        time.sleep(POLL_SECONDS)


@worker_ready.connect
def break_when_told(sender: Any, **_: Any) -> None:
    """Have the main process's loop fail as soon as the test has made a file."""

    def fail() -> None:
        raise RuntimeError("the loop is broken")

    def look() -> None:
        if (FOLDER / "break").exists():
            (FOLDER / "break").unlink()
            # A timer's errors are caught, these are not.
            sender.hub.call_soon(fail)

    sender.hub.call_repeatedly(POLL_SECONDS, look)


def hold(task: MeshTask) -> None:
    """Stay in the task's first run until the test lets it go, and in no other."""
    if not begin(task):
        wait_for(f"{task.task_id}.go")


@app.task(name="orders.loss.whole", bind=True)
def whole(self: MeshTask) -> None:
    """Is held with its transaction open."""
    record(self, "done")
    hold(self)


class DiesAfterParking(MeshTask):
    """Its process dies when its failure is committed, and the broker does not know yet."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Reject:
            if not (self.request.headers or {}).get("x-delivery-count"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise


class Late:
    """Is reached by the soft time limit while its process writes it to the main process."""

    def __reduce__(self) -> tuple[type[Late], tuple[()]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return Late, ()


class EndsWithItsLimit(MeshTask):
    """Its soft time limit comes when its outcome is committed, and the main process does not know yet."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        raise Ignore(Late())


@app.task(name="orders.loss.late", bind=True, base=EndsWithItsLimit)
def late(self: MeshTask) -> None:
    """Ends as its time does."""
    begin(self)
    record(self, "done")


@app.task(name="orders.loss.parks", bind=True, base=DiesAfterParking)
def parks(self: MeshTask) -> None:
    """Has its message parked."""
    begin(self)
    raise Reject("not for us", requeue=False)


@app.task(name="orders.loss.last", bind=True, transaction="last")
def last(self: MeshTask) -> None:
    """Is held before its transaction begins."""
    hold(self)
    record(self, "done")


@app.task(name="orders.loss.kill", bind=True, max_retries=2)
def kill(self: MeshTask, victim: str = "child", times: int = 1000) -> None:
    """Kills what it runs in, in its first runs."""
    record(self, "done")
    if begin(self) < times:
        os.kill(os.getppid() if victim == "parent" else os.getpid(), signal.SIGKILL)
        # A child whose parent is gone goes on until it is told to stop, too.
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="orders.loss.allocate", bind=True)
def allocate(self: MeshTask) -> None:
    """Takes more and more memory, in its first run."""
    record(self, "done")
    if not begin(self):
        taken = bytearray(300 * 2**20)
        taken[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(range(0, len(taken), os.sysconf("SC_PAGE_SIZE")))
        threading.Event().wait()


@app.task(name="orders.loss.overruns", bind=True, time_limit=1, soft_time_limit=None)
def overruns(self: MeshTask) -> None:
    """Goes beyond its hard time limit, in its first run."""
    record(self, "done")
    if not begin(self):
        threading.Event().wait()


@app.task(name="orders.loss.hang", bind=True, time_limit=1, soft_time_limit=None, max_retries=1)
def hang(self: MeshTask) -> None:
    """Never ends."""
    begin(self)
    threading.Event().wait()


@app.task(name="orders.loss.conflict", bind=True)
def conflict(self: MeshTask, sqlstate: str) -> None:
    """Is refused by the database in its first run."""
    record(self, "done")
    if not begin(self):
        self.session.execute(text(f"do $$ begin raise exception using errcode = '{sqlstate}'; end $$"))


@app.task(name="orders.loss.lock", bind=True)
def lock(self: MeshTask, name: str, first: int, second: int, other: str) -> None:
    """Locks two things, the second when the other task has its first: together they make a deadlock."""
    begin(self)
    self.session.execute(text("select pg_advisory_xact_lock(:key)"), {"key": first})
    (FOLDER / f"{name}.locked").touch()
    wait_for(f"{other}.locked")
    self.session.execute(text("select pg_advisory_xact_lock(:key)"), {"key": second})
    record(self, "done")


@app.task(name="orders.loss.retries", bind=True, retry_backoff=1, retry_jitter=False)
def retries(self: MeshTask) -> None:
    """Fails in its first run, for a reason that passes."""
    if not begin(self):
        raise TransientError("not yet")
    record(self, "done")


if __name__ == "__main__":
    main(app)
