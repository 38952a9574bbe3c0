"""What real processes export, against the table of docs/telemetry.md, against the ledger, and against what kills them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from running_gateway import Gateway, running_gateway
from running_orders import Orders, orders_service
from taskmesh.contracts.billing import IssueInvoice
from taskmesh.metrics.aggregates import BUCKETS_SECONDS
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.testing.otlp import OtlpSink, Point
from taskmesh.testing.smtp import SmtpSink
from taskmesh.testing.waiting import eventually

pytestmark = pytest.mark.timeout(600)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
SERVICE = Path(__file__).parents[1] / "services" / "counting_orders.py"
SCOPES = "tasks:write,tasks:read,schedules:write,schedules:read,dead-letters:read,dead-letters:write"
PLACE = "orders.order.place"


@dataclass
class Worker:
    """A worker service of the mesh's own, without its relay."""

    package: str
    folder: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, role: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{self.package}-{role}.log").open("wb") as log:
            command = [sys.executable, "-m", self.package, role]
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        return self.processes[-1]

    def start(self) -> None:
        assert self.run("setup").wait(120) == 0
        self.run("worker")
        eventually((self.folder / f"{self.package.partition('_')[0]}-worker.ready").exists, seconds=180)


@dataclass
class Mesh:
    """All the processes, and where they export to."""

    gateway: Gateway
    orders: Orders
    sink: OtlpSink
    folder: Path
    http: httpx.Client

    def submit(self, type_name: str = PLACE, **fields: Any) -> str:
        body = {"type": type_name, "payload": {"name": "a"}} | fields
        answer = self.http.post("/v1/tasks", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def scrape(self) -> Iterator[Any]:
        """The metric families of every process's page."""
        for log in self.folder.glob("*.log"):
            for line in log.read_text().splitlines():
                if "metrics page opened" in line:
                    said = json.loads(line)
                    with contextlib.suppress(httpx.ConnectError):
                        url = f"http://{said['host']}:{said['port']}/metrics"
                        yield from text_string_to_metric_families(httpx.get(url, trust_env=False).text)

    def counted(self, name: str, *attributes: str, **wanted: str) -> Counter[tuple[str, ...]]:
        """A counter's sum, or how many measurements a histogram has, over all processes, by some attributes."""
        sums: Counter[tuple[str, ...]] = Counter()
        for point in self.sink.measured(name, **wanted):
            key = tuple(point.attributes.get(attribute, "") for attribute in attributes)
            sums[key] += point.count if point.kind == "histogram" else int(point.value)
        return +sums

    def in_ledger(self, statement: str) -> Counter[tuple[str, ...]]:
        """What the ledger counts: rows whose last column is the count."""
        rows = [tuple(row.values()) for row in self.gateway.rows(statement)]
        return Counter({row[:-1]: row[-1] for row in rows})


@pytest.fixture(scope="module")
def mesh(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Every role of the gateway, three workers, and traffic of every kind, which has come to its end."""
    folder = tmp_path_factory.mktemp("metrics")
    roles = ("projector", "relay", "api", "scheduler", "reconciler")
    with (
        OtlpSink() as sink,
        SmtpSink() as smtp,
        orders_service(postgres, rabbitmq, folder, script=SERVICE, **exporting(sink)) as orders,
        running_gateway(postgres, orders.amqp_url, rabbitmq.management_url, folder) as gateway,
        shipped_worker("billing_worker", postgres, orders, folder, sink, BILLING),
        shipped_worker("email_worker", postgres, orders, folder, sink, EMAIL | {"TASKMESH_SMTP_URL": smtp.url}),
    ):
        gateway.environment |= exporting(sink) | RECONCILER
        for role in roles:
            gateway.spawn(role)
        for role in roles:
            gateway.wait_until_ready(role)
        with gateway.http(SCOPES) as http:
            made = Mesh(gateway, orders, sink, folder, http)
            announce(made)
            make_traffic(made)
            yield made


def exporting(sink: OtlpSink) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "TASKMESH_METRICS_PORT": "0",
        "TASKMESH_ANNOUNCE_SECONDS": "1",
    }


RECONCILER = {"TASKMESH_OBSERVE_SECONDS": "1", "TASKMESH_RECONCILE_INTERVAL_SECONDS": "2"}
BILLING = {
    # Between the two of them and the orders service, every pool.
    "TASKMESH_WORKER_POOL": "solo",
    "TASKMESH_SELLER_NAME": "Example Ltd",
    "TASKMESH_SELLER_ADDRESS": "1 Street|London",
    "TASKMESH_SELLER_VAT_ID": "DE123456789",
    "TASKMESH_SELLER_IBAN": "DE89370400440532013000",
}
EMAIL = {
    "TASKMESH_WORKER_POOL": "threads",
    "TASKMESH_MAIL_DOMAIN": "mail.example.com",
    "TASKMESH_MAIL_FROM": "Example Ltd <billing@example.com>",
}


@contextlib.contextmanager
def shipped_worker(
    package: str, postgres: str, orders: Orders, folder: Path, sink: OtlpSink, variables: dict[str, str]
) -> Iterator[Worker]:
    name = f"{package}_{uuid4().hex[:8]}"
    environment = {
        **os.environ,
        "TASKMESH_DATABASE_URL": create_database(postgres, name),
        "TASKMESH_AMQP_URL": orders.amqp_url,
        "TASKMESH_MANAGEMENT_URL": orders.management_url,
        "TASKMESH_HEALTH_DIR": str(folder),
        "TASKMESH_WORKER_CONCURRENCY": "1",
        "TASKMESH_OBJECT_STORE_URL": (folder / "objects").as_uri(),
        **variables,
        **exporting(sink),
    }
    worker = Worker(package, folder, environment)
    try:
        worker.start()
        yield worker
    finally:
        for process in worker.processes:
            process.terminate()
        for process in worker.processes:
            process.wait(60)
        drop_database(postgres, name)


def announce(mesh: Mesh) -> None:
    """Wait until all three services are known by what their setup, or their relay, has announced."""
    services = "select count(*) from manifests"
    eventually(lambda: mesh.gateway.rows(services)[0]["count"] == 3, seconds=60)


def make_traffic(mesh: Mesh) -> None:
    """Tasks that succeed, fail, are retried, cancelled, expired, dead-lettered, replayed and fired by a schedule."""
    now = datetime.now(UTC)
    ended = [mesh.submit() for _ in range(3)]
    ended += [
        mesh.submit(payload={"name": mode, "mode": mode}) for mode in ("bug", "permanent", "follow", "emit", "slow")
    ]
    ended.append(mesh.submit(payload={"name": "retry", "mode": "retry", "times": 1}))
    ended.append(mesh.submit(delay_seconds=1))
    ended.append(mesh.submit(delay_seconds=2, expires_at=(now + timedelta(seconds=1)).isoformat()))
    cancelled = mesh.submit(delay_seconds=600)
    assert mesh.http.post(f"/v1/tasks/{cancelled}:cancel", json={}).status_code == 200
    ended.append(
        mesh.submit("email.message.send", payload={"to": {"address": "a@b.example"}, "subject": "s", "text": "t"})
    )
    ended.append(mesh.submit("billing.invoice.issue", payload=INVOICE.payload()))
    parked = mesh.orders.send("orders.order.ship", nome="not in the contract")
    eventually(lambda: mesh.gateway.letters(parked))
    fire_once(mesh)
    # Without their relays the workers of billing and email tell nobody.
    for task_id in (*ended[:-2], parked):
        mesh.gateway.outcome(task_id)
    letter = mesh.gateway.letters(parked)[0]["id"]
    fixed = {"payload": {"name": "mended"}}
    assert mesh.http.post(f"/v1/dead-letters/{letter}:replay", json=fixed).status_code == 202
    mesh.orders.send("orders.order.ship", nome="stays open")
    unfinished = """
        select id from tasks where service = 'orders' and state in ('scheduled', 'queued', 'running', 'retrying')"""
    eventually(lambda: not mesh.gateway.rows(unfinished) and mesh.orders.idle())
    eventually(lambda: mesh.gateway.rows("select 1 from dead_letters where state = 'open'"))


INVOICE = IssueInvoice.model_validate(
    {
        "buyer": {"name": "Ada", "address": ["1 Street"], "country": "DE", "email": "a@b.example", "locale": "de-DE"},
        "currency": "EUR",
        "lines": [{"description": "x", "unit_price": "50.00", "tax": {"rate": "19"}}],
    }
)


def fire_once(mesh: Mesh) -> None:
    schedule = {"name": "every second", "type": "orders.order.ship", "payload": {"name": "x"}, "interval_seconds": 1}
    made = mesh.http.post("/v1/schedules", json=schedule)
    assert made.status_code == 201, made.text
    eventually(lambda: mesh.gateway.rows("select 1 from tasks where schedule_id is not null"))
    assert mesh.http.delete(f"/v1/schedules/{made.json()['id']}").status_code == 204


def rows() -> list[list[str]]:
    """The table's rows: metric, instrument, unit, attributes, role, meaning."""
    section = PAGE.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> frozenset[str]:
    return frozenset(re.findall(r"`([^`]+)`", cell))


def documented() -> dict[str, tuple[str, str, frozenset[str]]]:
    """Kind, unit and attributes by name."""
    return {name.strip("`"): (kind, unit.strip("`"), names(keys)) for name, kind, unit, keys, *_ in rows()}


def roles() -> dict[str, frozenset[str]]:
    """Who may export a metric."""
    every = frozenset({"api", "projector", "scheduler", "relay", "reconciler", "worker"})
    return {name.strip("`"): every if role == "every" else names(role) for name, _, _, _, role, _ in rows()}


def exported(points: list[Point]) -> dict[str, tuple[str, str, frozenset[str]]]:
    keys: dict[str, set[str]] = defaultdict(set)
    kinds: dict[str, tuple[str, str]] = {}
    for point in points:
        keys[point.name] |= set(point.attributes)
        kinds[point.name] = point.kind, point.unit
    return {name: (*kinds[name], frozenset(keys[name])) for name in kinds}


def by_prometheus(table: dict[str, tuple[str, str, frozenset[str]]]) -> dict[str, tuple[str, frozenset[str]]]:
    """The table under the names of a scrape; a counter's `_total` is not part of its family's name."""
    return {
        name.replace(".", "_") + ("_seconds" if unit == "s" else ""): (
            kind,
            frozenset(k.replace(".", "_") for k in keys),
        )
        for name, (kind, unit, keys) in table.items()
    }


def own(points: dict[Any, Point]) -> list[Point]:
    """Without those that the test's service has declared."""
    return [point for point in list(points.values()) if not point.name.startswith("orders.")]


def test_the_mesh_exports_by_otlp_exactly_what_the_table_says(mesh):
    """Names, kinds, units and attributes: nothing that is not documented, and nothing documented that never comes."""
    wanted = documented()
    assert len(wanted) == 29

    eventually(lambda: exported(own(mesh.sink.points)) == wanted, seconds=60, explain=lambda: difference(mesh, wanted))


def difference(mesh: Mesh, wanted: dict[str, Any]) -> str:
    found = exported(own(mesh.sink.points))
    return "\n".join(
        f"{name}: documented {wanted.get(name)}, exported {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    )


def test_the_mesh_shows_on_its_pages_exactly_what_the_table_says(mesh):
    """Under Prometheus's names; who the process is stands in `target_info` alone."""
    found: dict[str, tuple[str, set[str]]] = {}
    identities = []
    for family in mesh.scrape():
        if family.name == "target_info":
            identities.append(family.samples[0].labels)
        elif not family.name.startswith("orders_"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[family.name] = family.type, found.get(family.name, ("", set()))[1] | labels

    assert {name: (kind, frozenset(labels)) for name, (kind, labels) in found.items()} == by_prometheus(documented())
    assert {(each["service_name"], each["taskmesh_role"]) for each in identities} == {
        *(("gateway", role) for role in ("api", "projector", "scheduler", "relay", "reconciler")),
        *(("orders-worker", role) for role in ("worker", "relay")),
        ("billing-worker", "worker"),
        ("email-worker", "worker"),
    }


def test_each_metric_comes_from_the_roles_that_the_table_names(mesh):
    for point in own(mesh.sink.points):
        assert point.resource["taskmesh.role"] in roles()[point.name], point


def test_histograms_have_the_documented_buckets(mesh):
    bounds = {point.bounds for point in own(mesh.sink.points) if point.kind == "histogram"}

    assert bounds == {BUCKETS_SECONDS}


def test_transitions_are_the_rows_of_the_timeline(mesh):
    """Of tasks that succeeded, failed, were retried, cancelled, expired, replayed, scheduled and started by others."""
    rows = """
        select t.type, t.service, e.state, coalesce(e.detail -> 'failure' ->> 'code', ''), count(*)
        from task_events e join tasks t on t.id = e.task_id
        where e.state <> 'scheduled' group by 1, 2, 3, 4"""
    metric = "taskmesh.task.transitions"

    eventually(
        lambda: mesh.counted(metric, "type", "service", "state", "code") == mesh.in_ledger(rows),
        seconds=60,
        explain=lambda: f"{mesh.counted(metric, 'type', 'service', 'state', 'code')}\n{mesh.in_ledger(rows)}",
    )
    states = {key[0] for key in mesh.counted(metric, "state")}
    assert states == {"queued", "running", "retrying", "succeeded", "failed", "cancelled", "expired"}


@pytest.mark.parametrize(
    ("metric", "attributes", "statement"),
    [
        (
            "taskmesh.tasks.accepted",
            ("type",),
            "select type, count(*) from tasks where api_key_id is not null or schedule_id is not null group by 1",
        ),
        (
            "taskmesh.task.duration",
            ("type", "state"),
            "select type, state, count(*) from tasks where finished_at is not null and (queued_at is not null or state <> 'cancelled') group by 1, 2",
        ),
        (
            "taskmesh.task.wait.duration",
            ("type",),
            # Of a dead letter its worker tells later than the broker, and then it is no news that it had begun.
            """
            select type, count(*) from tasks
            where started_at is not null and state <> 'expired' and type <> 'orders.order.ship' group by 1""",
        ),
        ("taskmesh.dead_letters.stored", ("code",), "select code, count(*) from dead_letters group by 1"),
        (
            "taskmesh.schedule.fires",
            ("outcome",),
            "select outcome, count(*) from schedule_fires group by 1",
        ),
    ],
)
def test_counters_equal_what_the_ledger_says(mesh, metric, attributes, statement):
    def counted() -> Counter[tuple[str, ...]]:
        sums = mesh.counted(metric, *attributes)
        if metric == "taskmesh.task.wait.duration":
            del sums["orders.order.ship",]
        return sums

    eventually(
        lambda: counted() == mesh.in_ledger(statement),
        seconds=60,
        explain=lambda: f"{counted()}\n{mesh.in_ledger(statement)}",
    )


def test_a_tasks_duration_leads_to_a_trace_of_the_task(mesh):
    """And not to that of the batch in which the ledger heard of it, or of the request that cancelled it."""
    traces = {row["trace_id"] for row in mesh.gateway.rows("select trace_id from tasks where trace_id is not null")}

    for metric in ("taskmesh.task.duration", "taskmesh.task.run.duration", "messaging.process.duration"):
        assert eventually(lambda metric=metric: mesh.sink.exemplars[metric])
        strange = mesh.sink.exemplars[metric] - traces
        assert not strange, [(span.name, span.attributes) for span in mesh.sink.spans if span.trace_id in strange]


def test_what_a_child_has_counted_outlives_it_and_is_told_by_its_parent(mesh):
    """The child is killed in the statement after the one that counts; the task runs again, and counts no more."""
    worker = mesh.orders.processes["worker"].pid

    task_id = mesh.orders.send("orders.metrics.count")

    mesh.orders.wait(task_id, "succeeded")
    [point] = eventually(lambda: mesh.sink.measured("orders.counted"))
    assert point.value == 1
    assert point.resource["service.instance.id"] == f"{socket.gethostname()}:{worker}"
    told = {point.resource["service.instance.id"] for point in mesh.sink.measured("messaging.process.duration")}
    assert {instance for instance in told if instance == point.resource["service.instance.id"]}


def test_a_page_that_cannot_be_opened_keeps_no_role_from_its_work(mesh):
    """Another scheduler, on a port that is taken, says so and is ready."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        usual = mesh.gateway.environment
        folder = mesh.folder / "second"
        folder.mkdir()
        second = Gateway(
            mesh.gateway.database_url,
            usual | {"TASKMESH_METRICS_PORT": str(port), "TASKMESH_HEALTH_DIR": str(folder)},
            folder,
        )
        try:
            second.start("scheduler")
            log = (folder / "gateway-scheduler.log").read_text()
        finally:
            second.stop()

    [line] = [json.loads(line) for line in log.splitlines() if "metrics page not opened" in line]
    assert (line["level"], line["port"]) == ("ERROR", port)
