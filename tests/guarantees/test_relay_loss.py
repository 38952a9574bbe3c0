"""What leaves an outbox arrives, whatever happens to the relay on the way, and is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from running_gateway import Gateway
from taskmesh.management import Management
from taskmesh.testing.waiting import eventually
from taskmesh.topology import declare, worker_topology

from .conftest import Fragile, Wire

DYING = Path(__file__).parents[1] / "services" / "dying_relay.py"


@pytest.fixture
def idle_worker(orders: Fragile) -> None:
    """No worker takes what the relay publishes, so that copies can be counted."""
    orders.stop_role("worker")


def test_a_relay_killed_between_publish_and_delete(orders: Fragile, ledger: Gateway, idle_worker: None) -> None:
    """The row is still there, so it is published again; the inbox makes it once."""
    orders.stop_role("relay")
    task_id = orders.write("orders.loss.whole")
    orders.release(task_id)

    orders.spawn("relay", script=DYING)
    assert orders.processes["relay"].wait(timeout=120) == -9
    assert (orders.messages(), orders.outbox()) == (1, 1)
    orders.start("relay")
    eventually(lambda: (orders.messages(), orders.outbox()) == (2, 0))

    orders.start("worker")
    assert ledger.outcome(task_id)["state"] == "succeeded"
    eventually(lambda: orders.messages() == 0)
    assert orders.one_effect(task_id) and orders.starts(task_id) == 1


@pytest.fixture
def wire_to_relay(orders: Fragile, wire: Callable[[str], Wire]) -> Iterator[Wire]:
    """The relay's connection to the broker, in the hands of the test."""
    orders.stop_role("relay")
    proxy = wire(orders.amqp_url)
    orders.start("relay", TASKMESH_AMQP_URL=proxy.url)
    yield proxy
    orders.stop_role("relay")


def test_a_lost_confirm(orders: Fragile, ledger: Gateway, idle_worker: None, wire_to_relay: Wire) -> None:
    """The connection is cut between the publish and the broker's answer: published again, done once."""
    wire_to_relay.stall()
    task_id = orders.write("orders.loss.whole")
    orders.release(task_id)
    eventually(lambda: orders.messages() == 1)
    assert orders.outbox() == 1

    wire_to_relay.cut()
    eventually(lambda: (orders.messages(), orders.outbox()) == (2, 0))

    orders.start("worker")
    assert ledger.outcome(task_id)["state"] == "succeeded"
    eventually(lambda: orders.messages() == 0)
    assert orders.one_effect(task_id) and orders.starts(task_id) == 1


def test_an_unroutable_publish(orders: Fragile, ledger: Gateway) -> None:
    """The row waits, with the reason, and holds nobody up; it leaves once somebody takes it."""
    lost = orders.write("late.parcel.send")
    neighbour = orders.write("orders.loss.whole")
    orders.release(neighbour)

    assert ledger.outcome(neighbour)["state"] == "succeeded"
    [(failures, error)] = eventually(
        lambda: orders.rows("select failures, last_error from outbox where task_id = %s and failures > 0", lost)
    )
    assert failures and "NO_ROUTE" in error
    with Management(orders.management_url) as management:
        declare(worker_topology("late", []), amqp_url=orders.amqp_url, management=management)

    assert eventually(lambda: orders.messages("late") == 1)
    assert eventually(lambda: orders.outbox() == 0)


def test_a_full_queue(orders: Fragile, ledger: Gateway, idle_worker: None) -> None:
    """The broker refuses what does not fit, and the outbox keeps it until there is room."""
    with orders.policy(max_length=1):
        tasks = [orders.write("orders.loss.whole")]
        eventually(lambda: orders.messages() >= 1)
        tasks += [orders.write("orders.loss.whole") for _ in range(5)]
        for task_id in tasks:
            orders.release(task_id)
        refused = eventually(lambda: orders.rows("select last_error from outbox where failures > 0"))
        assert "a queue is full" in refused[0][0]

    orders.start("worker")
    assert {ledger.outcome(task_id)["state"] for task_id in tasks} == {"succeeded"}
    assert all(orders.one_effect(task_id) and orders.starts(task_id) == 1 for task_id in tasks)
    assert eventually(lambda: orders.outbox() == 0)
