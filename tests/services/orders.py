"""A worker service that misbehaves on demand, for the tests of the worker runtime."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from celery import chain, group
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from taskmesh.contracts import Command, Event
from taskmesh.errors import PermanentError, TransientError
from taskmesh.worker import MeshTask, WorkerApp, main

app = WorkerApp("orders")


class PlaceOrder(Command, type="orders.order.place"):
    """Places an order, in one of several ways."""

    name: str
    mode: Literal[
        "well",
        "retry",
        "transient",
        "permanent",
        "bug",
        "follow",
        "emit",
        "crash_before",
        "crash_after",
        "slow",
        "hang",
    ] = "well"
    times: int = 0


class ShipOrder(Command, type="orders.order.ship"):
    """Ships an order."""

    name: str


class OrderPlaced(Event, type="orders.order.placed"):
    """An order was placed."""

    name: str


def record(task: MeshTask, note: str) -> None:
    task.session.execute(
        text("insert into effects (task_id, note, attempt, at) values (:task_id, :note, :attempt, :at)"),
        {"task_id": task.task_id, "note": note, "attempt": task.request.retries + 1, "at": datetime.now(UTC)},
    )


@app.task(PlaceOrder, max_retries=3, retry_backoff=1, retry_jitter=False)
def place(self: MeshTask, command: PlaceOrder) -> dict[str, Any]:
    record(self, command.name)
    if command.mode == "crash_before" and not (self.request.headers or {}).get("x-delivery-count"):
        os.kill(os.getpid(), signal.SIGKILL)
    if command.mode == "retry" and self.request.retries < command.times:
        self.send(ShipOrder(name="must not leave"))
        raise self.retry(countdown=0.2)
    if command.mode == "transient":
        raise TransientError("the carrier is away")
    if command.mode == "permanent":
        raise PermanentError("no such product")
    if command.mode == "bug":
        return {"secret": 1 / 0}
    if command.mode == "follow":
        self.send(ShipOrder(name=command.name))
        ship.apply_async(kwargs={"name": command.name + " later"}, countdown=0.3)
    if command.mode == "emit":
        self.emit(OrderPlaced(name=command.name))
    if command.mode == "slow":
        time.sleep(1.0)
    if command.mode == "hang":
        self.session.execute(text("select pg_sleep(60)"))
    return {"order": command.name}


@app.task(ShipOrder)
def ship(self: MeshTask, command: ShipOrder) -> None:
    record(self, "shipped " + command.name)


@app.task(OrderPlaced)
def on_placed(self: MeshTask, event: OrderPlaced) -> None:
    record(self, f"heard {event.name}")
    if event.name == "listener retries" and not self.request.retries:
        raise TransientError("not yet")


@app.task(name="orders.plain.add", bind=True)
def add(self: MeshTask, x: int, y: int) -> int:
    record(self, str(x + y))
    return x + y


@app.task(name="orders.plain.note", bind=True)
def note(self: MeshTask, failed_id: str) -> None:
    record(self, f"errback {failed_id}")


@app.task(name="orders.plain.poison", bind=True, max_retries=0)
def poison(self: MeshTask) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="orders.plain.commit", bind=True)
def commit(self: MeshTask) -> None:
    self.session.commit()


@app.task(name="orders.steps.run", bind=True, transaction="last")
def steps(self: MeshTask, fail: bool = False) -> None:
    with self.transaction() as session:
        session.execute(
            text("insert into effects (task_id, note, attempt, at) values (:task_id, 'step', 0, now())"),
            {"task_id": self.task_id},
        )
    if fail:
        raise PermanentError("after the step")
    record(self, "last")


@app.task(name="orders.api.call", bind=True)
def call(self: MeshTask, way: str) -> str:  # noqa: C901 - a branch for each way of sending
    """Uses one part of Celery's API."""
    record(self, way)
    match way:
        case "delay":
            ship.delay(name="delay")
        case "contract":
            ship.delay(ShipOrder(name="contract"))
        case "signature":
            ship.s(name="signature").apply_async()
        case "by name":
            self.app.send_task("orders.order.ship", kwargs={"name": "by name"})
        case "group":
            group(ship.s(name="group 1"), ship.s(name="group 2")).apply_async()
        case "chain":
            chain(add.s(1, 2), add.s(3)).apply_async()
        case "link":
            add.apply_async((1, 2), link=add.s(4))
        case "replace":
            self.replace(add.s(x=20, y=1))
        case "replace by a chain":
            self.replace(chain(add.s(1, 2), add.s(3)))
        case "direct":
            add(10, 5)
        case "expires":
            ship.apply_async(kwargs={"name": "expires"}, countdown=0.5, expires=0.1)
        case "bad payload":
            ship.delay(nome="typo")
        case "quiet retry" if not self.request.retries:
            self.retry(countdown=0.1, throw=False)
        case "ignore":
            raise Ignore
        case "fail with errback":
            ship.delay(name="must not leave")
            raise PermanentError("no")
    return way


@app.task(name="orders.api.soft_limit", bind=True, soft_time_limit=1, time_limit=20, max_retries=1, retry_backoff=1)
def soft_limit(self: MeshTask) -> None:
    """Hangs in a query in its first attempt."""
    record(self, "before the query")
    if not self.request.retries:
        self.session.execute(text("select pg_sleep(60)"))


@app.task(name="orders.api.waits", bind=True, soft_time_limit=2, time_limit=30)
def waits(self: MeshTask) -> None:
    """Needs the database."""
    record(self, "done")


@app.task(name="orders.api.refused", bind=True)
def refused(self: MeshTask) -> None:
    """Writes what the database refuses at the commit."""
    record(self, "refused")
    self.session.execute(text("insert into checked_at_commit values (1), (1)"))


@app.task(name="orders.api.unstorable", bind=True)
def unstorable(self: MeshTask) -> str:
    """Returns what the ledger cannot keep."""
    record(self, "done")
    return "a\x00b"


@app.task(name="orders.api.hides_outage", bind=True, retry_backoff=1)
def hides_outage(self: MeshTask) -> None:
    """Loses its connection in its first run, and calls that by another name."""
    if not self.request.retries:
        try:
            self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))
        except DBAPIError as error:
            raise TransientError("the database is away") from error
    record(self, f"delivered {(self.request.headers or {}).get('x-delivery-count', 0)} times before")


_cut: set[UUID] = set()


@app.task(name="orders.api.cut", bind=True)
def cut(self: MeshTask) -> str:
    """Ends well, but loses its connection just before the commit of its first run."""
    record(self, "cut")
    if self.task_id not in _cut:
        _cut.add(self.task_id)
        backend = self.session.scalar(text("select pg_backend_pid()"))
        with self.app.sessions() as other:
            other.execute(text("select pg_terminate_backend(:backend)"), {"backend": backend})
    return "cut"


@app.task(name="orders.api.ignores_outage", bind=True)
def ignores_outage(self: MeshTask) -> None:
    """Loses its connection in its first run, and goes on as if nothing had happened."""
    if self.task_id not in _cut:
        _cut.add(self.task_id)
        with suppress(DBAPIError):
            self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))
    record(self, "done")


def break_down(*_: Any) -> None:
    raise RuntimeError("a hook with a mistake")


@app.task(name="orders.api.hooked", bind=True, on_failure=break_down)
def hooked(self: MeshTask) -> None:
    """Fails, and so does its hook."""
    raise PermanentError("no")


@app.task(name="orders.api.hooked_hang", bind=True, time_limit=1, soft_time_limit=None, on_failure=break_down)
def hooked_hang(self: MeshTask) -> None:
    """Hangs in its first run, and has a hook that fails."""
    if not (self.request.headers or {}).get("x-delivery-count"):
        time.sleep(60)
    record(self, "done")


class OutOfTime(MeshTask):
    """Its time is up just after its attempt was committed, in its first delivery."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = not (self.request.headers or {}).get("x-delivery-count")
        result = super().__call__(*args, **kwargs)
        if first:
            raise SoftTimeLimitExceeded
        return result


@app.task(name="orders.api.late_limit", bind=True, base=OutOfTime)
def late_limit(self: MeshTask) -> None:
    """Is in time, but for Celery's own work after it."""
    record(self, "done")


@app.task(name="orders.steps.hang", bind=True, transaction="last", soft_time_limit=1, time_limit=20, max_retries=1)
def hanging_step(self: MeshTask) -> None:
    """Hangs in a query of a step, in its first attempt."""
    with self.transaction() as session:
        session.execute(
            text("insert into effects (task_id, note, attempt, at) values (:task_id, 'step', 0, now())"),
            {"task_id": self.task_id},
        )
        if not self.request.retries:
            session.execute(text("select pg_sleep(60)"))


@app.task(name="orders.api.outlasts", bind=True)
def outlasts(self: MeshTask) -> None:
    """Takes longer than a stopping worker waits, in its first delivery."""
    record(self, "done")
    if not (self.request.headers or {}).get("x-delivery-count"):
        time.sleep(60)


@app.task(name="orders.api.hard_limit", bind=True, time_limit=1, soft_time_limit=None)
def hard_limit(self: MeshTask) -> None:
    """Hangs where no exception reaches it, in its first delivery."""
    record(self, "once")
    if not (self.request.headers or {}).get("x-delivery-count"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        time.sleep(60)


@app.task(name="orders.attempts.crash", bind=True, max_retries=2, retry_backoff=1, retry_jitter=False)
def crash(self: MeshTask, transient: int = 0) -> None:
    """Kills its process in every attempt after the first `transient` ones, which fail in a way that may pass."""
    count_start(self)
    if self.request.retries < transient:
        raise TransientError("not yet")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="orders.attempts.unlimited", bind=True, max_retries=None)
def crash_without_limit(self: MeshTask) -> None:
    """Kills its process, and may be retried for ever."""
    count_start(self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="orders.attempts.once", bind=True, max_retries=0)
def once(self: MeshTask, seconds: float = 0) -> None:
    """May be started once, and takes its time the first time."""
    if count_start(self) == 1:
        time.sleep(seconds)
    record(self, "done")


@app.task(name="orders.attempts.outside", bind=True, transaction="last", max_retries=0)
def outside(self: MeshTask, seconds: float, cut: bool = False) -> None:
    """Works outside its transaction; with `cut` it loses the connection that holds its lock."""
    count_start(self)
    if cut:
        with self.transaction() as session:
            session.execute(
                text(
                    "select pg_terminate_backend(pid) from pg_locks"
                    " where locktype = 'advisory' and database = (select oid from pg_database"
                    " where datname = current_database())"
                )
            )
    time.sleep(seconds)
    record(self, "done")


@app.task(name="orders.attempts.replaced", bind=True, max_retries=0)
def replaced(self: MeshTask, left: int) -> None:
    """Replaces itself by a copy, some times."""
    count_start(self)
    if left:
        self.replace(replaced.s(left=left - 1))
    record(self, "done")


@app.task(name="orders.attempts.rejects", bind=True, max_retries=2)
def rejects(self: MeshTask, way: str) -> None:
    """Has its message parked; "limit" as Celery does when a soft time limit comes while it writes a retry."""
    if count_start(self) == 1 and way == "limit":
        raise Reject(SoftTimeLimitExceeded(), requeue=False)
    if way == "park":
        raise Reject("not for us", requeue=False)
    record(self, "done")


def count_start(task: MeshTask) -> int:
    """Note a start where no crash undoes it; how many there are."""
    with task.transaction() as session:
        session.execute(
            text("insert into effects (task_id, note, attempt, at) values (:task_id, 'start', 0, now())"),
            {"task_id": task.task_id},
        )
        statement = text("select count(*) from effects where task_id = :task_id and note = 'start'")
        return int(session.scalar(statement, {"task_id": task.task_id}) or 0)


@app.task(name="orders.cancel.loop", bind=True)
def loop(self: MeshTask, watched: bool = True) -> None:
    """Does not end by itself, but looks whether it is wanted; or does not even look."""
    record(self, "loop")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if watched:
            self.raise_if_cancelled()
        time.sleep(0.02)


@app.task(name="orders.cancel.grind", bind=True, force_cancel=True)
def grind(self: MeshTask) -> None:
    """Hears nothing, but may be killed."""
    record(self, "ground")
    time.sleep(60)


@app.task(name="orders.cancel.step", bind=True, transaction="last", force_cancel=True)
def grind_after_step(self: MeshTask) -> None:
    """Commits a step, then hears nothing, but may be killed."""
    count_start(self)
    time.sleep(60)


@app.task(name="orders.cancel.later", bind=True)
def later(self: MeshTask) -> None:
    """Asks for another attempt in an hour."""
    record(self, "later")
    raise self.retry(countdown=3600)


if __name__ == "__main__":
    main(app)
