"""The reconciler among real processes: a gateway, a service that runs tasks, a broker whose queues a person purges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pika
import pytest

from running_gateway import Gateway, running_gateway
from running_orders import Orders, orders_service
from taskmesh.testing.otlp import OtlpSink
from taskmesh.testing.waiting import eventually

TASKS = 20
SETTINGS = {
    "TASKMESH_OBSERVE_SECONDS": "1",
    "TASKMESH_RECONCILE_INTERVAL_SECONDS": "2",
    "TASKMESH_RECONCILE_GRACE_SECONDS": "0",
    "OTEL_METRIC_EXPORT_INTERVAL": "500",
}

pytestmark = pytest.mark.timeout(300)


class Mesh:
    """Both services, and their broker."""

    def __init__(self, gateway: Gateway, orders: Orders, sink: OtlpSink) -> None:
        self.gateway = gateway
        self.orders = orders
        self.sink = sink

    def submit(self, count: int = 1, mode: str = "well") -> list[str]:
        with self.http() as http:
            body = {"tasks": [{"type": "orders.order.place", "payload": {"name": "a", "mode": mode}}] * count}
            answer = http.post("/v1/tasks:batchCreate", json=body).raise_for_status()
        return [task["id"] for task in answer.json()["items"]]

    def http(self) -> httpx.Client:
        return self.gateway.http("tasks:write,tasks:read,reconciliation:read,reconciliation:write")

    def purge(self, queue: str) -> int:
        with pika.BlockingConnection(pika.URLParameters(self.orders.amqp_url)) as connection:
            return int(connection.channel().queue_purge(queue).method.message_count)

    def depth(self, queue: str) -> int:
        with pika.BlockingConnection(pika.URLParameters(self.orders.amqp_url)) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)

    def work(self) -> None:
        """Make sure that a worker runs."""
        worker = self.orders.processes.get("worker")
        if worker is None or worker.poll() is not None:
            self.orders.start("worker")

    def audits(self, *, since: int = 0) -> list[dict[str, Any]]:
        return self.gateway.rows("select * from audits where id > %s order by id", since)

    def last_audit(self) -> int:
        return max((audit["id"] for audit in self.audits()), default=0)

    def audited(self, times: int) -> list[dict[str, Any]]:
        """Wait for that many more audits."""
        since = self.last_audit()
        return eventually(lambda: len(found := self.audits(since=since)) >= times and found)

    def wait_for_audit(self, since: int, **wanted: Any) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            for audit in self.audits(since=since):
                if all((audit | audit["detail"])[name] == value for name, value in wanted.items()):
                    return audit
            return None

        return eventually(found, explain=lambda: f"audits: {self.audits()[-3:]}")

    def state(self, task_id: str) -> str:
        task = self.gateway.task(task_id)
        assert task is not None
        return str(task["state"])


@pytest.fixture(scope="module")
def mesh(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One for all tests of this module: each but the last leaves it without unfinished tasks."""
    folder = tmp_path_factory.mktemp("reconciler")
    roles = ("projector", "relay", "api")
    with (
        OtlpSink() as sink,
        orders_service(postgres, rabbitmq, folder, "relay") as orders,
        running_gateway(postgres, orders.amqp_url, rabbitmq.management_url, folder, *roles) as gateway,
    ):
        gateway.environment |= SETTINGS | {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint}
        gateway.start("reconciler")
        eventually(lambda: gateway.rows("select 1 from manifests where service = 'orders'"))
        yield Mesh(gateway, orders, sink)


def test_tasks_of_a_purged_queue_are_named_and_sent_again_and_each_runs_once(mesh):
    before = mesh.last_audit()
    task_ids = mesh.submit(TASKS)
    eventually(lambda: mesh.depth("orders") == TASKS)

    assert mesh.purge("orders") == TASKS

    named = mesh.wait_for_audit(before, unaccounted=TASKS)
    assert (named["accepted"], named["redriven"]) == (TASKS, TASKS)
    eventually(lambda: mesh.sink.gauges.get("taskmesh.unaccounted_tasks") == TASKS)
    mesh.work()
    eventually(lambda: {mesh.state(task_id) for task_id in task_ids} == {"succeeded"})
    assert [mesh.orders.notes(task_id) for task_id in task_ids] == [["a"]] * TASKS
    mesh.wait_for_audit(named["id"], finished=TASKS, unaccounted=0)
    eventually(lambda: mesh.sink.gauges.get("taskmesh.unaccounted_tasks") == 0)


def test_a_task_whose_lifecycle_event_was_purged_is_mended(mesh):
    before = mesh.last_audit()
    mesh.gateway.stop_role("projector")
    [task_id] = mesh.submit()
    mesh.work()
    mesh.orders.wait(task_id, "succeeded")
    eventually(mesh.orders.idle)
    assert mesh.purge("gateway.lifecycle")

    mesh.gateway.start("projector")

    mesh.wait_for_audit(before, mended=1)
    assert mesh.state(task_id) == "succeeded"


def test_an_audit_that_is_asked_for_has_started_after_the_call(mesh):
    before = mesh.last_audit()
    with mesh.http() as http:
        answer = http.post("/v1/reconciliation:run", json={"grace_seconds": 0}).raise_for_status().json()
    assert answer["audit"]["id"] > before
    assert answer["unaccounted"] == []


def test_a_second_replica_takes_over_from_one_that_was_killed(mesh):
    first = mesh.gateway.processes["reconciler"]
    # Ready as soon as it waits for its turn.
    mesh.gateway.start("reconciler")

    first.kill()
    first.wait()

    assert mesh.audited(2)


def test_the_command_says_zero_when_all_tasks_are_accounted_for(mesh):
    mesh.audited(1)
    with mesh.http() as http:
        environment = os.environ | {
            "TASKMESH_URL": str(http.base_url),
            "TASKMESH_API_KEY": http.headers["Authorization"].removeprefix("Bearer "),
        }
    done = subprocess.run(
        [sys.executable, "-c", "from taskmesh.cli import main; main()", "reconcile", "--run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unaccounted" in done.stdout


def test_a_task_that_runs_and_loses_its_worker_is_accounted_for_all_the_time(mesh):
    mesh.work()
    [task_id] = mesh.submit(mode="hang")
    eventually(lambda: mesh.state(task_id) == "running")
    running = mesh.audited(3)

    worker = mesh.orders.processes["worker"]
    children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (worker.pid, *map(int, children.split())):
        os.kill(pid, signal.SIGKILL)
    worker.wait()
    eventually(lambda: mesh.depth("orders") == 1)
    lost = mesh.audited(6)

    assert [audit["unaccounted"] for audit in running + lost] == [0] * len(running + lost)
    assert mesh.depth("orders") == 1
