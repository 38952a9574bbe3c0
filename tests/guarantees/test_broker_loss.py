"""The broker goes away or stops taking messages; tasks are accepted all the same, and each is done once."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest

from running_gateway import Gateway, running_gateway
from running_orders import orders_service
from taskmesh.parts.rabbitmq import RabbitMQ
from taskmesh.testing.waiting import eventually

from .conftest import FRAGILE, Fragile

NO_ALARM = {"memory": ("set_vm_memory_high_watermark", "0.6"), "disk": ("set_disk_free_limit", "50MB")}
ALARM = {
    "memory": ("set_vm_memory_high_watermark", "0"),
    # More than any disk has.
    "disk": ("set_disk_free_limit", "mem_relative", "100000.0"),
}


@pytest.fixture(scope="module")
def orders(postgres: str, own_rabbitmq: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    """The service, on a broker that may be killed."""
    folder = tmp_path_factory.mktemp("orders")
    with orders_service(postgres, own_rabbitmq, folder, script=FRAGILE, kind=Fragile) as service:
        yield service


@pytest.fixture(scope="module")
def gateway(postgres: str, orders: Fragile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway that takes tasks for the service, on the same broker."""
    roles = ("api", "relay", "projector")
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(postgres, orders.amqp_url, orders.management_url, folder, *roles) as gateway:
        eventually(lambda: gateway.rows("select 1 from manifests where service = 'orders'"))
        yield gateway


@pytest.fixture(scope="module")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.http() as http:
        yield http


def submit(http: httpx.Client, **request: object) -> str:
    """Have a task accepted; returns its id."""
    answer = http.post("/v1/tasks", json={"type": "orders.loss.whole", "payload": {}, **request})
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    return str(answer.json()["id"])


def test_a_broker_restart(own_rabbitmq: RabbitMQ, orders: Fragile, gateway: Gateway, http: httpx.Client) -> None:
    """Killed with tasks running, waiting in its queues and not yet published; started again, each is done once."""
    running, *queued = [submit(http) for _ in range(6)]
    orders.started(running)
    eventually(lambda: gateway.outbox() == 0)

    own_rabbitmq.kill()
    unpublished = submit(http)
    orders.release(running)
    # Its outcome is committed although nobody can be told.
    assert orders.wait(running) == "succeeded"
    for task_id in (*queued, unpublished):
        orders.release(task_id)
    own_rabbitmq.start()

    tasks = [running, *queued, unpublished]
    assert {gateway.outcome(task_id)["state"] for task_id in tasks} == {"succeeded"}
    assert all(orders.one_effect(task_id) for task_id in tasks)
    assert orders.starts(running) == 1
    assert quiet(orders, gateway)


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_a_broker_alarm(
    own_rabbitmq: RabbitMQ, orders: Fragile, gateway: Gateway, http: httpx.Client, resource: str
) -> None:
    """The broker reads from no publisher: tasks are accepted, wait in the outboxes, and go on when the alarm is over."""
    waiting = submit(http)
    orders.started(waiting)
    own_rabbitmq.control(*ALARM[resource])
    try:
        tasks = [submit(http) for _ in range(5)]
        for task_id in (waiting, *tasks):
            orders.release(task_id)
        # What was delivered before is finished; its outcome waits to be told.
        assert orders.wait(waiting) == "succeeded"
        eventually(lambda: "blocked" in own_rabbitmq.control("list_connections", "state"))
        assert gateway.outbox() == 5 and not any(orders.starts(task_id) for task_id in tasks)
    finally:
        own_rabbitmq.control(*NO_ALARM[resource])

    assert {gateway.outcome(task_id)["state"] for task_id in (waiting, *tasks)} == {"succeeded"}
    assert all(orders.one_effect(task_id) and orders.starts(task_id) == 1 for task_id in (waiting, *tasks))
    assert quiet(orders, gateway)


@pytest.mark.parametrize("mode", ["whole", "last"])
def test_connection_loss_in_mid_task(orders: Fragile, gateway: Gateway, mode: str) -> None:
    """The message comes again while its first run goes on: the second waits for the first, and finds it done."""
    task_id = orders.send(f"orders.loss.{mode}", task_id=str(uuid4()))
    orders.started(task_id)

    orders.close_connections()
    eventually(orders.waits_for_a_lock, explain=orders.end_of_log)
    assert orders.starts(task_id) == 1
    orders.release(task_id)

    assert gateway.outcome(task_id)["state"] == "succeeded"
    assert quiet(orders, gateway)
    assert orders.one_effect(task_id) and orders.starts(task_id) == 1


def quiet(orders: Fragile, gateway: Gateway) -> bool:
    """Wait until no row waits in an outbox and no message in a queue, handed over or not."""

    def is_quiet() -> bool:
        unacknowledged = orders.unacknowledged()
        return not (gateway.outbox() or orders.outbox() or orders.messages() or unacknowledged)

    return eventually(is_quiet, explain=orders.end_of_log)


def test_consumer_timeout(own_rabbitmq: RabbitMQ, orders: Fragile, gateway: Gateway) -> None:
    """The broker takes a message back that is held for longer than it allows: it comes again, and is not done again."""
    usual = own_rabbitmq.control("eval", "application:get_env(rabbit, consumer_timeout).")
    limit_ms = usual.strip().removeprefix("{ok,").removesuffix("}")
    orders.stop_role("worker")
    set_consumer_timeout(own_rabbitmq, "1000", tick_ms=300)
    try:
        # Where there is a policy for it, that overrules the broker's own.
        with orders.policy(consumer_timeout=1000):
            orders.start("worker")
            task_id = orders.send("orders.loss.last")
            orders.started(task_id)
            eventually(orders.waits_for_a_lock, explain=orders.end_of_log)
    finally:
        set_consumer_timeout(own_rabbitmq, limit_ms, tick_ms=60_000)
    orders.release(task_id)

    assert gateway.outcome(task_id)["state"] == "succeeded"
    assert orders.processes["worker"].poll() is None
    orders.stop_role("worker")
    orders.start("worker")
    assert quiet(orders, gateway)
    assert orders.one_effect(task_id) and orders.starts(task_id) == 1


def set_consumer_timeout(broker: RabbitMQ, limit_ms: str, *, tick_ms: int) -> None:
    """Set how long a message may stay unacknowledged, and how often that is looked at; for channels opened from now on."""
    settings = {"consumer_timeout": limit_ms, "channel_tick_interval": str(tick_ms)}
    calls = [f"application:set_env(rabbit, {name}, {value})" for name, value in settings.items()]
    broker.control("eval", ", ".join(calls) + ".")
