"""A small mesh whose processes export to a collector of the test's: a gateway, a service, and one that listens to it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_gateway import Gateway, running_gateway
from running_orders import Orders, orders_service
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.testing.otlp import OtlpSink, Span
from taskmesh.testing.waiting import eventually
from wires import Wire

from .trees import draw

AUDITS = Path(__file__).parents[1] / "services" / "audits.py"
SCOPES = "tasks:write,tasks:read,types:read,schedules:write,schedules:read,dead-letters:read,dead-letters:write"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder time for the start of processes of their own, unless they ask for more."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@dataclass
class Traced:
    """The mesh, and what it has exported."""

    gateway: Gateway
    orders: Orders
    broker: Wire
    sink: OtlpSink
    http: httpx.Client

    def submit(self, type_name: str, payload: dict[str, Any] | None = None, **fields: Any) -> tuple[str, str]:
        """Ask for a task; returns its id and the id of the request's trace."""
        answer = self.http.post("/v1/tasks", json={"type": type_name, "payload": payload or {}} | fields)
        assert answer.status_code == httpx.codes.ACCEPTED, answer.text
        return str(answer.json()["id"]), answer.headers["Taskmesh-Trace-Id"]

    def trace_of(self, task_id: str) -> str:
        """The id of the trace in which the task is executed, as the ledger has it."""
        task = self.gateway.task(task_id)
        assert task
        return str(task["trace_id"])

    def spans(self, trace_id: str) -> list[Span]:
        """What has come of a trace."""
        return [span for span in self.sink.spans if span.trace_id == trace_id]

    def shows(self, trace_id: str, expected: str) -> list[Span]:
        """Wait until the trace is exactly what is expected, and return its spans."""
        wanted = textwrap.dedent(expected).strip()
        eventually(
            lambda: draw(self.spans(trace_id)) == wanted,
            seconds=45,
            explain=lambda: f"the trace is\n{draw(self.spans(trace_id))}\nand not\n{wanted}",
        )
        return self.spans(trace_id)


@pytest.fixture(scope="package")
def exported() -> Iterator[OtlpSink]:
    """The collector."""
    with OtlpSink() as sink:
        yield sink


@pytest.fixture(scope="package")
def traced(
    postgres: str, rabbitmq: Any, exported: OtlpSink, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traced]:
    """The mesh, up; a test that takes something down brings it up again."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": exported.endpoint,
        # A test waits for spans as a person does.
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    folder = tmp_path_factory.mktemp("traced")
    wire = Wire(rabbitmq.amqp_url)
    broker = _Broker(wire.url, rabbitmq.management_url)
    orders_at = orders_service(postgres, broker, folder, **variables, TASKMESH_ANNOUNCE_SECONDS="2")
    roles = ("api", "relay", "projector", "scheduler")
    try:
        with (
            orders_at as orders,
            running_gateway(postgres, orders.amqp_url, broker.management_url, folder, *roles, **variables) as gateway,
            _audits(postgres, orders, folder),
            gateway.http(SCOPES) as http,
        ):
            eventually(lambda: http.get("/v1/types/orders.order.place").is_success)
            eventually(lambda: gateway.rows("select 1 from manifests where service = 'audits'"))
            yield Traced(gateway, orders, wire, exported, http)
    finally:
        wire.close()


@dataclass(frozen=True)
class _Broker:
    amqp_url: str
    management_url: str


class _audits:  # noqa: N801 - used like a function
    """Run the listening service beside the other one, in a database of its own."""

    def __init__(self, postgres: str, orders: Orders, folder: Path) -> None:
        self._postgres = postgres
        self._name = orders.vhost.replace("orders", "audits")
        self._folder = folder
        self._environment = orders.environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        url = create_database(self._postgres, self._name)
        environment = {**self._environment, "TASKMESH_DATABASE_URL": url}
        subprocess.run([sys.executable, str(AUDITS), "setup"], env=environment, check=True)
        for role in ("relay", "worker"):
            with (self._folder / f"audits-{role}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen([sys.executable, str(AUDITS), role], env=environment, stdout=log, stderr=log)
                )
        for role in ("relay", "worker"):
            eventually((self._folder / f"audits-{role}.ready").exists, seconds=180)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(timeout=60)
        drop_database(self._postgres, self._name)
