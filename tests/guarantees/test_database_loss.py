"""A database goes away, or refuses a transaction for a reason that passes: no task is lost, and none done twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from running_gateway import Gateway, running_gateway
from running_orders import orders_service
from taskmesh.parts.postgres import Postgres
from taskmesh.testing.waiting import eventually

from .conftest import FRAGILE, Fragile


@pytest.fixture(scope="module")
def orders_on_own_postgres(
    own_postgres: Postgres, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fragile]:
    """The service, on a database server that may be killed."""
    folder = tmp_path_factory.mktemp("own-orders")
    with orders_service(own_postgres.url, rabbitmq, folder, script=FRAGILE, kind=Fragile) as service:
        yield service


def test_database_restart_of_a_worker(own_postgres: Postgres, orders_on_own_postgres: Fragile) -> None:
    """Killed in mid-task: the attempt waits for the database and runs again in place; what waits in the queue runs."""
    orders = orders_on_own_postgres
    running, queued = orders.send("orders.loss.whole"), orders.send("orders.loss.whole")
    orders.started(running)
    for task_id in (running, queued):
        orders.release(task_id)

    own_postgres.kill()
    during = orders.send("orders.loss.whole")
    orders.release(during)
    own_postgres.start()

    tasks = [running, queued, during]
    assert {orders.wait(task_id) for task_id in tasks} == {"succeeded"}
    assert all(orders.one_effect(task_id) for task_id in tasks)
    told = [event for event in eventually(lambda: told_of(orders, tasks)) if event.state == "succeeded"]
    assert sorted(str(event.task_id) for event in told) == sorted(tasks)


def test_long_database_outage(own_postgres: Postgres, orders_on_own_postgres: Fragile) -> None:
    """The worker takes no more tasks after some seconds: they wait in the queue, and no delivery is spent on them."""
    orders = orders_on_own_postgres
    own_postgres.kill()
    # Its time limit of two seconds gives it back again and again while the worker takes tasks.
    tasks = [orders.send("orders.api.waits") for _ in range(3)]
    eventually(lambda: orders.consumers() == 0 and orders.messages() == 3, explain=orders.end_of_log)
    own_postgres.start()

    assert {orders.wait(task_id) for task_id in tasks} == {"succeeded"}
    assert all(orders.one_effect(task_id) for task_id in tasks)


def test_database_restart_of_the_gateway(
    own_postgres: Postgres, orders: Fragile, shared_ledger: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is reported meanwhile waits in the broker, and is in the ledger afterwards."""
    if shared_ledger.processes["projector"].poll() is None:
        # It would take its share of the reports.
        shared_ledger.stop_role("projector")
    folder = tmp_path_factory.mktemp("own-gateway")
    with running_gateway(own_postgres.url, orders.amqp_url, orders.management_url, folder, "projector") as ledger:
        before = orders.send("orders.loss.whole")
        orders.release(before)
        assert ledger.outcome(before)["state"] == "succeeded"

        own_postgres.kill()
        good, bad = orders.send("orders.loss.whole"), orders.send("orders.no.such")
        orders.release(good)
        assert orders.wait(good) == "succeeded"
        own_postgres.start()

        assert [ledger.outcome(task_id)["state"] for task_id in (before, good, bad)] == [
            "succeeded",
            "succeeded",
            "failed",
        ]
        assert len(ledger.letters(bad)) == 1


@pytest.mark.parametrize(("sqlstate", "name"), [("40001", "serialization failure"), ("40P01", "deadlock")])
def test_serialization_failure(orders: Fragile, ledger: Gateway, sqlstate: str, name: str) -> None:
    """The attempt is undone and runs again in place; that is no attempt, and no redelivery."""
    task_id = orders.send("orders.loss.conflict", sqlstate=sqlstate)

    outcome = ledger.outcome(task_id)
    assert (outcome["state"], outcome["attempt"]) == ("succeeded", 1), name
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id)) == (2, 1)


def test_deadlock(orders: Fragile, ledger: Gateway) -> None:
    """PostgreSQL ends one of two tasks that wait for each other; it runs again in place when the other has ended."""
    one = orders.send("orders.loss.lock", name="one", first=1, second=2, other="two")
    two = orders.send("orders.loss.lock", name="two", first=2, second=1, other="one")

    assert {ledger.outcome(task_id)["state"] for task_id in (one, two)} == {"succeeded"}
    assert orders.one_effect(one) and orders.one_effect(two)
    assert orders.starts(one) + orders.starts(two) == 3


def told_of(orders: Fragile, tasks: list[str]) -> list[Any]:
    """What was reported of the tasks, once all of them are reported done."""
    events = [event for event in orders.events() if str(event.task_id) in tasks]
    return events if len({e.task_id for e in events if e.state == "succeeded"}) == len(tasks) else []
