"""A worker is told to stop: what can end in time ends, the rest goes back and counts as no attempt."""

from __future__ import annotations

import signal

import pytest

from running_gateway import Gateway
from taskmesh.testing.waiting import eventually

from .conftest import Fragile


def test_warm_shutdown(orders: Fragile, ledger: Gateway) -> None:
    """A task that ends within the soft shutdown time ends in its worker."""
    task_id = orders.send("orders.loss.whole")
    orders.started(task_id)
    orders.processes["worker"].send_signal(signal.SIGTERM)
    orders.release(task_id)

    assert orders.processes["worker"].wait(timeout=120) == 0
    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id) and orders.starts(task_id) == 1


@pytest.mark.parametrize("mode", ["whole", "last"])
def test_cold_shutdown(orders: Fragile, ledger: Gateway, mode: str) -> None:
    """A longer task's message goes back; it runs once elsewhere, and its drained run is no attempt."""
    orders.stop_role("worker")
    orders.start("worker", TASKMESH_SOFT_SHUTDOWN_SECONDS="0.5")
    task_id = orders.send(f"orders.loss.{mode}")
    orders.started(task_id)
    orders.stop_role("worker")
    assert orders.state(task_id) in (None, "waiting")
    orders.start("worker")

    outcome = ledger.outcome(task_id)
    assert (outcome["state"], outcome["attempt"]) == ("succeeded", 1)
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id)) == (2, 1)


@pytest.mark.parametrize("moment", ["imported", "forked", "ready"])
def test_sigterm_at_worker_start_up(orders: Fragile, ledger: Gateway, moment: str) -> None:
    """It ends, at whatever moment of its start it is told to, and leaves the tasks to the next one."""
    orders.stop_role("worker")
    task_id = orders.send("orders.loss.whole")
    orders.release(task_id)
    process = orders.spawn("worker")
    reached = {
        "imported": orders.catches_sigterm,
        "forked": lambda: bool(orders.children()),
        "ready": (orders.health / "orders-worker.ready").exists,
    }
    eventually(lambda: reached[moment]() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)

    orders.start("worker")
    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
