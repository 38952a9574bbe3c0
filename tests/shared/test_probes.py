"""What a worker tells probes of itself: the truth, and nothing that a restart would not mend."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import psycopg
import pytest

from running_orders import Orders, orders_service
from taskmesh.health import why_not_alive, why_not_ready
from taskmesh.parts.rabbitmq import RabbitMQ, find
from taskmesh.testing.waiting import eventually

OVERLONG = Path(__file__).parents[1] / "services" / "overlong_orders.py"


def role(orders: Orders) -> Path:
    return orders.health / "orders-worker"


def is_ready(orders: Orders) -> bool:
    return why_not_ready(role(orders), max_age_seconds=5) is None


def is_alive(orders: Orders) -> bool:
    return why_not_alive(role(orders), max_age_seconds=5) is None


def goes_on(orders: Orders) -> Callable[[], bool]:
    """Says whether the worker has beaten since."""
    file = orders.health / "orders-worker.alive"
    before = file.stat().st_mtime
    return lambda: file.stat().st_mtime > before


@pytest.fixture
def orders(postgres: str, rabbitmq, tmp_path: Path) -> Iterator[Orders]:
    with orders_service(postgres, rabbitmq, tmp_path, "worker") as service:
        yield service


@pytest.fixture
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A broker that may be stopped."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = find(Path(folder) / "rabbitmq", say=print)
        if not isinstance(server, RabbitMQ):
            pytest.skip("needs an installed rabbitmq-server, to stop it")
        server.start()
        try:
            yield server
        finally:
            server.purge()


def test_a_worker_without_its_broker_is_alive_and_not_ready(postgres, own_rabbitmq, tmp_path):
    """It goes on beating however long the broker is away, and is ready again when it is back."""
    with orders_service(postgres, own_rabbitmq, tmp_path, "worker") as orders:
        assert is_ready(orders)

        own_rabbitmq.kill()

        eventually(lambda: not is_ready(orders))
        for _ in range(3):
            eventually(goes_on(orders))
        assert is_alive(orders)
        own_rabbitmq.start()
        eventually(lambda: is_ready(orders))


def test_a_worker_that_starts_without_a_broker_is_alive_and_not_ready(orders):
    orders.stop()

    orders.spawn("worker", TASKMESH_AMQP_URL="amqp://guest:guest@127.0.0.1:1/none")

    eventually((orders.health / "orders-worker.alive").exists)
    eventually(goes_on(orders))
    assert not is_ready(orders)


def test_a_worker_whose_queue_is_gone_is_not_ready_and_takes_it_up_again(orders):
    assert is_ready(orders)
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        channel = connection.channel()
        # In the first moments, while the worker asks for more than messages, the end of its queue may go unheard.
        for _ in range(3):
            eventually(goes_on(orders))
        channel.queue_delete("orders")
        eventually(lambda: not is_ready(orders))
        eventually(goes_on(orders))

        channel.queue_declare("orders", durable=True, arguments={"x-queue-type": "quorum"})

    eventually(lambda: is_ready(orders))


def test_a_paused_worker_is_ready_so_that_a_mended_release_can_be_rolled_out(orders):
    with psycopg.connect(orders.database_url, autocommit=True) as connection:
        connection.execute(
            "insert into pauses (paused_at, changed_at) values (now(), now())"
            " on conflict (one) do update set paused_at = now(), changed_at = now()"
        )
    eventually(lambda: "worker paused" in (orders.health / "worker.log").read_text())

    eventually(goes_on(orders))
    assert is_ready(orders)


def test_a_worker_that_stands_still_is_not_alive(orders):
    process = orders.processes["worker"]
    os.kill(process.pid, signal.SIGSTOP)
    try:
        eventually(lambda: not is_alive(orders))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    eventually(lambda: is_alive(orders))


def test_a_worker_that_holds_a_task_beyond_its_limit_calls_itself_dead(orders):
    """Here its pool has lost the clock that would have ended the task."""
    orders.stop()
    orders.spawn("worker", script=OVERLONG)
    orders.wait_until_ready("worker")

    orders.send("orders.api.hooked_hang")

    eventually(lambda: not is_alive(orders))
    assert "a task runs for longer than its hard time limit" in (orders.health / "worker.log").read_text()


def test_a_worker_that_stops_is_not_ready_and_not_dead(orders):
    """It has cancelled its consumers by itself, and lets a task run on."""
    orders.stop()
    process = orders.spawn("worker", script=OVERLONG)
    orders.wait_until_ready("worker")
    task_id = orders.send("orders.order.place", name="long", mode="hang")
    eventually(lambda: orders.state(task_id) == "waiting")

    process.terminate()

    eventually(lambda: not is_ready(orders))
    process.wait(timeout=60)
    assert "worker calls itself dead" not in (orders.health / "worker.log").read_text()


def test_a_long_task_of_a_solo_pool_is_no_reason_to_restart_it(orders):
    """Its loop runs the task itself, and beats all the same."""
    orders.stop()
    orders.spawn("worker", TASKMESH_WORKER_POOL="solo")
    orders.wait_until_ready("worker")

    task_id = orders.send("orders.order.place", name="long", mode="hang")
    eventually(lambda: orders.state(task_id) == "waiting")
    for _ in range(3):
        eventually(goes_on(orders))

    assert is_ready(orders)
    assert orders.state(task_id) == "waiting"
    orders.processes["worker"].kill()
