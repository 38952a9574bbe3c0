"""A worker service that misbehaves on demand, for the tests of the worker runtime."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import text

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


if __name__ == "__main__":
    main(app)
