"""A task that is cancelled over HTTP ends without its effect, at each stage of its life, in all its processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from running_gateway import Gateway
from taskmesh.testing.waiting import eventually

from .conftest import Fragile

SCOPES = "tasks:write,tasks:read,types:read,services:write"


@pytest.fixture(scope="module")
def caller(shared_orders: Fragile, shared_ledger: Gateway) -> Iterator[httpx.Client]:
    """A caller of a gateway that knows the service's types."""
    for role in ("api", "relay"):
        shared_ledger.start(role)
    for role in ("relay", "worker"):
        if shared_orders.processes[role].poll() is not None:
            shared_orders.start(role)
    with shared_ledger.http(SCOPES) as http:
        # The service announces itself every half minute.
        eventually(lambda: http.get("/v1/types/orders.loss.whole").is_success)
        yield http
    for role in ("api", "relay"):
        shared_ledger.stop_role(role)


@pytest.fixture
def http(caller: httpx.Client, orders: Fragile, ledger: Gateway) -> httpx.Client:
    """The caller, while every role of gateway and service runs."""
    if ledger.processes["relay"].poll() is not None:
        ledger.start("relay")
    return caller


def submit(http: httpx.Client, type_name: str, /, payload: Any = None, **fields: Any) -> str:
    answer = http.post("/v1/tasks", json={"type": type_name, "payload": payload or {}} | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def cancel(http: httpx.Client, task_id: str, *, wait: int = 30, **request: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/tasks/{task_id}:cancel", json=request, headers={"Prefer": f"wait={wait}"}, timeout=60)
    assert answer.status_code in {200, 202}, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_scheduled_task(http: httpx.Client, orders: Fragile) -> None:
    """It ends where it waits: in the gateway."""
    task_id = submit(http, "orders.loss.whole", delay_seconds=3600)

    answer = cancel(http, task_id, wait=0)

    assert (answer["outcome"], answer["task"]["state"]) == ("cancelled", "cancelled")


def test_a_queued_task_while_nothing_leaves_the_gateway(http: httpx.Client, orders: Fragile, ledger: Gateway) -> None:
    """It has not left, so it never will."""
    ledger.stop_role("relay")
    task_id = submit(http, "orders.loss.whole")

    answer = cancel(http, task_id, wait=0)

    ledger.start("relay")
    assert answer["outcome"] == "cancelled"
    eventually(lambda: ledger.outbox() == 0)
    assert orders.starts(task_id) == 0


def test_200_queued_tasks_while_no_worker_is_up(http: httpx.Client, orders: Fragile, ledger: Gateway) -> None:
    """Each ends at once, and the worker that comes up later runs none."""
    orders.stop_role("worker")
    batch = [{"type": "orders.loss.whole", "payload": {}}] * 200
    ids = [task["id"] for task in http.post("/v1/tasks:batchCreate", json={"tasks": batch}).json()["items"]]
    eventually(lambda: orders.messages() == 200)

    outcomes = [cancel(http, task_id, wait=0)["outcome"] for task_id in ids]
    states = "select count(*) from tasks where id = any(%s::uuid[]) and state = 'cancelled'"
    eventually(lambda: ledger.rows(states, ids)[0]["count"] == 200)
    orders.start("worker")

    eventually(lambda: orders.messages() == 0)
    assert set(outcomes) == {"requested"}
    assert sum(orders.starts(task_id) for task_id in ids) == 0
    assert orders.rows("select 1 from effects where task_id = any(%s::uuid[])", ids) == []


def test_a_task_that_waits_for_its_retry(http: httpx.Client, orders: Fragile, ledger: Gateway) -> None:
    """The retry would have come in an hour."""
    task_id = submit(http, "orders.cancel.later")
    eventually(lambda: (task := ledger.task(task_id)) and task["state"] == "retrying")

    explained = http.get(f"/v1/tasks/{task_id}:explain").json()
    answer = cancel(http, task_id)

    assert (explained["reason"], answer["outcome"]) == ("retry_due", "cancelled")
    assert orders.notes(task_id) == []


def test_a_running_task_that_looks_whether_it_is_wanted(http: httpx.Client, orders: Fragile, ledger: Gateway) -> None:
    task_id = submit(http, "orders.cancel.loop")
    eventually(lambda: (task := ledger.task(task_id)) and task["state"] == "running")

    explained = http.get(f"/v1/tasks/{task_id}:explain").json()
    answer = cancel(http, task_id, reason="a mistake")

    assert (explained["reason"], answer["outcome"]) == ("running", "cancelled")
    assert (answer["task"]["cancel_reason"], answer["task"]["attempt"]) == ("a mistake", 1)
    assert orders.notes(task_id) == []


def test_a_running_task_that_does_not_look_is_killed_by_force(
    http: httpx.Client, orders: Fragile, ledger: Gateway
) -> None:
    """Where its type allows that."""
    task_id = submit(http, "orders.cancel.grind")
    eventually(lambda: (task := ledger.task(task_id)) and task["state"] == "running")

    answer = cancel(http, task_id, force=True)

    assert answer["outcome"] == "cancelled"
    assert orders.notes(task_id) == []


def test_a_task_that_has_ended(http: httpx.Client, orders: Fragile, ledger: Gateway) -> None:
    """Nothing is changed."""
    task_id = submit(http, "orders.order.place", {"name": "first"})
    ledger.outcome(task_id)

    answer = cancel(http, task_id)

    assert (answer["outcome"], answer["task"]["state"]) == ("already_finished", "succeeded")
    assert orders.notes(task_id) == ["first"]


def test_a_failed_task_that_the_gateway_never_saw_is_tried_again(
    http: httpx.Client, orders: Fragile, ledger: Gateway
) -> None:
    """Its service tells with the failure what it was asked to do."""
    task_id = orders.send("orders.order.place", name="unseen", mode="permanent")
    ledger.outcome(task_id)

    answer = http.post(f"/v1/tasks/{task_id}:retry")

    new = answer.json()
    assert (answer.status_code, new["retry_of"]) == (202, task_id)
    assert new["payload"]["name"] == "unseen"
    assert ledger.outcome(new["id"])["state"] == "failed"


def test_a_paused_service_takes_no_task_until_it_is_resumed(
    http: httpx.Client, orders: Fragile, ledger: Gateway
) -> None:
    http.post("/v1/services/orders:pause", json={"reason": "migration"})
    eventually(lambda: orders.consumers() == 0)
    task_id = submit(http, "orders.order.place", {"name": "later"})
    eventually(lambda: orders.messages() == 1)

    explained = http.get(f"/v1/tasks/{task_id}:explain").json()
    http.post("/v1/services/orders:resume")

    assert (explained["reason"], explained["summary"].endswith("migration.")) == ("paused", True)
    assert ledger.outcome(task_id)["state"] == "succeeded"
