"""How often a task is started, whatever becomes of its starts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from running_orders import Orders
from taskmesh.testing.proxy import TcpProxy
from taskmesh.testing.waiting import eventually


def starts(orders: Orders, task_id: str) -> int:
    return orders.notes(task_id).count("start")


def run_outside(orders: Orders, task_id: str) -> bool:
    """True while the task holds the lock of a task that works outside its transaction."""
    return bool(
        starts(orders, task_id)
        and orders.rows(
            "select 1 from pg_locks where locktype = 'advisory' and database ="
            " (select oid from pg_database where datname = current_database())"
        )
    )


def test_a_task_that_kills_its_process_is_started_as_often_as_it_may_be(orders: Orders) -> None:
    """No start more, no start less; then it is failed as poison, with its payload, and its message is kept."""
    before = orders.dead_letters()
    task_id = orders.send("orders.attempts.crash", transient=0)

    assert orders.wait(task_id) == "failed"
    assert starts(orders, task_id) == 3
    [failed] = eventually(lambda: [event for event in orders.events(task_id) if event.state == "failed"])
    assert failed.failure is not None
    assert failed.failure.code == "poison"
    assert failed.payload == {"transient": 0}
    assert eventually(lambda: orders.dead_letters() == before + 1)


def test_crashes_and_exceptions_share_the_attempts_of_a_task(orders: Orders) -> None:
    """One exception and two crashes make three."""
    task_id = orders.send("orders.attempts.crash", transient=1)

    assert orders.wait(task_id) == "failed"
    assert starts(orders, task_id) == 3


def test_a_task_without_a_limit_is_not_started_for_ever_when_it_kills_its_process(orders: Orders) -> None:
    """Ten lost workers are enough."""
    task_id = orders.send("orders.attempts.unlimited")

    assert orders.wait(task_id) == "failed"
    assert starts(orders, task_id) == 10


def test_a_start_that_a_stopping_worker_ends_is_not_counted(orders: Orders) -> None:
    """The task may be started once, and is: the start that a drain has ended was none."""
    task_id = orders.send("orders.attempts.once", seconds=60)
    eventually(lambda: starts(orders, task_id))
    orders.processes["worker"].send_signal(signal.SIGTERM)
    orders.processes["worker"].wait(timeout=20)
    assert orders.rows("select starts, started_at from inbox where task_id = %s", task_id) == [(0, None)]
    orders.start("worker")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "start", "done"]


def test_a_start_that_a_stopping_worker_ends_is_not_counted_by_the_worker_that_waits(orders: Orders) -> None:
    """The start is taken back before the message: another worker takes that in the same moment."""
    task_id = orders.send("orders.attempts.once", seconds=60)
    eventually(lambda: starts(orders, task_id))
    stopping = orders.processes["worker"]
    orders.start("worker")
    stopping.send_signal(signal.SIGTERM)

    assert stopping.wait(timeout=20) is not None
    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "start", "done"]


def test_a_thread_that_works_inside_its_transaction_does_not_keep_a_worker_from_stopping(orders: Orders) -> None:
    """Nor is its start counted, though it holds the row in which that is written."""
    orders.processes["worker"].terminate()
    orders.processes["worker"].wait(timeout=20)
    orders.environment["TASKMESH_WORKER_POOL"] = "threads"
    try:
        orders.start("worker")
        task_id = orders.send("orders.attempts.once", seconds=60)
        eventually(lambda: starts(orders, task_id))
        orders.processes["worker"].send_signal(signal.SIGTERM)
        assert orders.processes["worker"].wait(timeout=20) == 0
        assert orders.rows("select starts, started_at from inbox where task_id = %s", task_id) == [(0, None)]
    finally:
        del orders.environment["TASKMESH_WORKER_POOL"]
        orders.processes["worker"].kill()
        orders.start("worker")

    assert orders.wait(task_id) == "succeeded"


@asynccontextmanager
async def stopping_in_mid_task(orders: Orders, *, seconds: float) -> AsyncIterator[tuple[str, TcpProxy]]:
    """A task in a worker that has been told to stop, and the worker's way to its broker."""

    def stop_in_mid_task() -> str:
        orders.processes["worker"].terminate()
        orders.processes["worker"].wait(timeout=20)
        orders.start("worker")
        task_id = orders.send("orders.attempts.once", seconds=seconds)
        eventually(lambda: starts(orders, task_id))
        before = len(log.read_text())
        orders.processes["worker"].send_signal(signal.SIGTERM)
        eventually(lambda: "worker stops" in log.read_text()[before:])
        return task_id

    log = orders.health / "worker.log"
    direct = orders.environment["TASKMESH_AMQP_URL"]
    async with TcpProxy(direct) as proxy:
        orders.environment["TASKMESH_AMQP_URL"] = proxy.url
        try:
            yield await asyncio.to_thread(stop_in_mid_task), proxy
        finally:
            orders.environment["TASKMESH_AMQP_URL"] = direct
            orders.processes["worker"].kill()
            await asyncio.to_thread(orders.start, "worker")


async def test_a_worker_that_stops_takes_no_task_when_its_connection_comes_back(orders: Orders) -> None:
    """It lets the task that runs end, and leaves the others to the next worker."""
    async with stopping_in_mid_task(orders, seconds=4) as (running, proxy):
        proxy.cut()
        late = await asyncio.to_thread(orders.send, "orders.attempts.once")
        await asyncio.to_thread(orders.processes["worker"].wait, 20)
        assert (orders.state(running), orders.state(late)) == ("succeeded", None)

    assert await asyncio.to_thread(orders.wait, late) == "succeeded"


async def test_a_worker_that_loses_the_broker_while_it_stops_stops(orders: Orders) -> None:
    """It cannot hear of its tasks, and ends when their time is up."""
    async with stopping_in_mid_task(orders, seconds=60) as (task_id, proxy):
        await proxy.refuse()
        await asyncio.to_thread(orders.processes["worker"].wait, 20)

    assert await asyncio.to_thread(orders.wait, task_id) == "succeeded"


def test_a_worker_that_stops_lets_a_short_task_end(orders: Orders) -> None:
    """And is gone as soon as it has ended, not when its time is up."""
    task_id = orders.send("orders.attempts.once", seconds=0.5)
    eventually(lambda: starts(orders, task_id))
    orders.processes["worker"].send_signal(signal.SIGTERM)

    assert orders.processes["worker"].wait(timeout=20) == 0
    assert orders.state(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "done"]
    orders.start("worker")


@pytest.mark.parametrize("turn", range(5))
def test_a_worker_stops_when_it_is_told_to_in_its_first_moments(orders: Orders, turn: int) -> None:
    """Whatever frame it is in the middle of writing."""
    orders.processes["worker"].terminate()
    orders.processes["worker"].wait(timeout=20)
    orders.start("worker")
    orders.processes["worker"].send_signal(signal.SIGTERM)

    assert orders.processes["worker"].wait(timeout=10) == 0, turn
    orders.start("worker")


def test_a_second_delivery_waits_for_a_task_that_works_outside_its_transaction(orders: Orders) -> None:
    """Then it finds the task finished: it was started once."""
    task_id = str(uuid4())
    orders.send("orders.attempts.outside", task_id=task_id, seconds=1.5)
    eventually(lambda: run_outside(orders, task_id))
    orders.send("orders.attempts.outside", task_id=task_id, seconds=0)

    assert orders.wait(task_id) == "succeeded"
    # A task behind the second delivery shows that it has been dealt with.
    assert orders.wait(orders.send("orders.attempts.once")) == "succeeded"
    assert orders.notes(task_id) == ["start", "done"]


def test_a_task_survives_the_loss_of_the_connection_that_holds_its_lock(orders: Orders) -> None:
    """The lock keeps a second delivery waiting, and nothing else depends on it."""
    task_id = orders.send("orders.attempts.outside", seconds=0, cut=True)

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "done"]


def test_a_task_that_replaces_itself_is_not_taken_for_one_that_was_lost(orders: Orders) -> None:
    """Each replacement is a task of its own under the same id, with attempts of its own."""
    task_id = orders.send("orders.attempts.replaced", left=3)

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "start", "start", "start", "done"]


def test_a_soft_time_limit_in_the_middle_of_writing_a_retry_does_not_park_the_task(orders: Orders) -> None:
    """The message goes back, and the start counts."""
    before = orders.dead_letters()
    task_id = orders.send("orders.attempts.rejects", way="limit")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["start", "start", "done"]
    assert orders.dead_letters() == before


def test_a_task_that_rejects_its_message_has_failed_everywhere(orders: Orders) -> None:
    """In the inbox, in the ledger, and with its message among the dead letters."""
    before = orders.dead_letters()
    task_id = orders.send("orders.attempts.rejects", way="park")

    assert orders.wait(task_id) == "failed"
    [failed] = eventually(lambda: [event for event in orders.events(task_id) if event.state == "failed"])
    assert failed.failure is not None
    assert failed.failure.code == "rejected"
    assert eventually(lambda: orders.dead_letters() == before + 1)
