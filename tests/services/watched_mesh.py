"""A real local mesh with a real Prometheus that scrapes it and has its rules, some twenty times as fast as in operation.

Nothing of the rules is rewritten but numbers: each window is divided, each `for` is two seconds, and each threshold that
has to follow is named in `THRESHOLDS`.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pika
from rich.console import Console

from taskmesh.client import Task, Taskmesh
from taskmesh.contracts import Command
from taskmesh.parts.ports import free_port, is_answering
from taskmesh.parts.postgres import Postgres
from taskmesh.parts.processes import log_end, spawn
from taskmesh.parts.rabbitmq import RabbitMQ
from taskmesh.testing.waiting import eventually
from taskmesh_local import backing, environment
from taskmesh_local.faults.options import TRIALS, Options
from taskmesh_local.folders import Folders
from taskmesh_local.mesh import Mesh
from taskmesh_local.progress import Progress
from taskmesh_local.roles import PACKAGES, Fleet
from taskmesh_local.state import State, locked
from taskmesh_observability.rules import FOLDER as RULES

FASTER = 20
"""Five minutes of a rule are a quarter of a minute here."""
SCRAPE_SECONDS = 1
# The file, what it says, and what it is to say: times that are figures in an expression.
THRESHOLDS = (
    ("objectives.yml", "60 * group by (service)", "2.5 * group by (service)"),
    ("objectives.yml", "vector(86400)", "vector(10)"),
    ("objective-alerts.yml", "6 * 3600 * avg_over_time", "1080 * avg_over_time"),
    ("alerts.yml", "taskmesh_outbox_lag_seconds) > 60", "taskmesh_outbox_lag_seconds) > 3"),
    (
        "alerts.yml",
        "taskmesh_projector_lag_seconds_bucket[5m]))) > 60",
        "taskmesh_projector_lag_seconds_bucket[5m]))) > 3",
    ),
    ("alerts.yml", 'le=~"60(\\\\.0)?"', 'le=~"2[.]5"'),
    ("alerts.yml", "taskmesh:worker:slots > 600", "taskmesh:worker:slots > 30"),
)
LENGTH = re.compile(r"(?<=\[)\d+[smhd](?=\])|(?<=offset )\d+[smhd]")
PENDING = re.compile(r"(?<=for: )\d+[smhd]")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
VARIABLES = {
    # Full after some requests; in operation a process keeps two thousand spans.
    "OTEL_BSP_MAX_QUEUE_SIZE": "16",
    "TASKMESH_LOG_FORMAT": "json",
    "TASKMESH_METRICS_PORT": "0",
    "TASKMESH_OBSERVE_SECONDS": "1",
    "TASKMESH_RECONCILE_INTERVAL_SECONDS": "1",
    "TASKMESH_RECONCILE_GRACE_SECONDS": "3",
    "TASKMESH_REDRIVE": "False",
    "TASKMESH_WORKER_CONCURRENCY": "4",
}
SERVICE_NAMES = {"gateway": "gateway", "billing": "billing-worker", "email": "email-worker", "trials": "trials"}


def faster(text: str) -> str:
    """Rules with every window divided, though not below the three scrapes that a rate needs, and every `for` short."""

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[0][:-1]) * SECONDS[found[0][-1]] / FASTER
        return f"{max(round(seconds), 3 * SCRAPE_SECONDS)}s"

    return PENDING.sub("2s", LENGTH.sub(shorter, text))


def write_rules(folder: Path) -> None:
    """Write the rules of this repository, made faster."""
    folder.mkdir()
    texts = {path.name: path.read_text() for path in RULES.glob("*.yml")}
    for name, before, after in THRESHOLDS:
        assert before in texts[name], f"{name} does not say {before!r} any more"
        texts[name] = texts[name].replace(before, after)
    for name, text in texts.items():
        (folder / name).write_text(faster(text))


class Prometheus:
    """The server, and the alerts that fire in it."""

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        (folder / "targets").mkdir(parents=True)
        write_rules(folder / "rules")
        (folder / "prometheus.yml").write_text(
            f"""
global: {{scrape_interval: {SCRAPE_SECONDS}s, scrape_timeout: {SCRAPE_SECONDS}s, evaluation_interval: {SCRAPE_SECONDS}s}}
rule_files: [rules/*.yml]
scrape_configs:
  - job_name: taskmesh
    file_sd_configs: [{{files: [targets/*.json], refresh_interval: 1s}}]
"""
        )
        command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        self._log = folder / "prometheus.log"
        self._process = spawn(command, log=self._log)
        eventually(lambda: is_answering(self._port), explain=lambda: log_end(self._log, lines=10))

    def stop(self) -> None:
        self._process.stop(10)

    def scrape(self, targets: list[dict[str, Any]]) -> None:
        """Scrape these from now on."""
        unfinished = self._folder / "targets" / "mesh.tmp"
        unfinished.write_text(json.dumps(targets))
        unfinished.replace(self._folder / "targets" / "mesh.json")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What the expression finds at this moment."""
        return self._get("query", query=expression)["result"]

    def now(self) -> float:
        """Its clock, in seconds."""
        return float(self._get("query", query="time()")["result"][1])

    def firing(self) -> set[str]:
        """The names of the alerts that fire; one of an objective with `fast` or `slow` behind."""
        labels = [alert["labels"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"]
        return {f"{each['alertname']} {each['burn']}" if "burn" in each else each["alertname"] for each in labels}

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        answer = httpx.get(f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters, trust_env=False)
        return answer.raise_for_status().json()["data"]


class WatchedMesh:
    """The mesh, what is done to it, and what Prometheus says to that."""

    def __init__(self, mesh: Mesh, state: State, fleet: Fleet, prometheus: Prometheus) -> None:
        self._mesh = mesh
        self._state = state
        self._fleet = fleet
        self.prometheus = prometheus
        variables = environment.read(state.folders.env)
        self.client = Taskmesh(variables["TASKMESH_URL"], variables["TASKMESH_API_KEY"], timeout=5)
        self.url, self.key = variables["TASKMESH_URL"], variables["TASKMESH_API_KEY"]
        self.amqp_url = variables["TASKMESH_AMQP_URL"]

    @property
    def broker(self) -> RabbitMQ:
        broker = backing.known_rabbitmq(self._state)
        assert isinstance(broker, RabbitMQ)
        return broker

    @property
    def database(self) -> Postgres:
        database = backing.postgres(self._state)
        assert isinstance(database, Postgres)
        return database

    def fires(self, *alerts: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until all of these fire, and do something again and again meanwhile."""

        def look() -> bool:
            meanwhile()
            return set(alerts) <= self._look()

        eventually(look, seconds=90, explain=lambda: f"firing: {self._look()}")

    def is_over(self, *alerts: str) -> None:
        """Wait until none of these fires any more."""
        eventually(lambda: not set(alerts) & self._look(), seconds=240, explain=lambda: f"firing: {self._look()}")

    def kill(self, role: str) -> None:
        """Kill a role's process; nobody starts it again."""
        process = self._state.process(role)
        assert process is not None
        process.kill()
        self._scrape()

    def start(self, role: str) -> None:
        """Start it again."""
        self._mesh.relaunch(role)
        eventually(lambda: self._mesh.standing(role).is_up, explain=lambda: log_end(self._log(role), lines=10))
        eventually(lambda: self._port(role) is not None)
        self._scrape()

    @contextlib.contextmanager
    def without(self, role: str) -> Iterator[None]:
        """The mesh without this role, for as long as the block takes."""
        self.kill(role)
        try:
            yield
        finally:
            self.start(role)

    @contextlib.contextmanager
    def stopped(self, role: str) -> Iterator[None]:
        """The role's process stands still for as long as the block takes."""
        process = self._state.process(role)
        assert process is not None
        process.send(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send(signal.SIGCONT)

    @contextlib.contextmanager
    def without_collector(self) -> Iterator[None]:
        """The mesh without the page that its processes export to, for as long as the block takes."""
        process = self._state.process("traces")
        assert process is not None
        process.kill()
        try:
            yield
        finally:
            self._mesh.up()

    def run(self, *commands: Command) -> None:
        """Submit these, and wait until each has ended, however."""
        self.wait(self.client.submit_many(commands))

    def wait(self, tasks: Iterable[Task]) -> None:
        """Wait until each has ended, however: what is left over would disturb the next test."""
        for task in tasks:
            self.client.wait(task.id, timeout=120)

    def passes(self, *, seconds: float) -> None:
        """Return when so much time has passed on Prometheus' clock."""
        begun = self.prometheus.now()
        eventually(lambda: self.prometheus.now() - begun > seconds)

    def publish(self, queue: str, body: bytes) -> None:
        """Put some bytes into a queue, past the mesh."""
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self.amqp_url))) as connection:
            connection.channel().basic_publish("", queue, body)

    def purge(self, queue: str) -> None:
        """Take every message out of a queue, past the mesh."""
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self.amqp_url))) as connection:
            connection.channel().queue_purge(queue)

    def delete(self, queue: str) -> None:
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self.amqp_url))) as connection:
            connection.channel().queue_delete(queue)

    def set_up(self, role: str) -> None:
        """Start a role that is down as a deployment does: its service's `setup` runs before it."""
        assert self._state.process(role) is None
        self._mesh.up()
        eventually(lambda: self._port(role) is not None)
        self._scrape()

    def scrape_all(self) -> None:
        """Scrape every role, once each has said where."""
        for role in self._fleet.roles:
            eventually(lambda role=role: self._port(role.name) is not None)
        self._scrape()

    def _look(self) -> set[str]:
        return self.prometheus.firing()

    def _scrape(self) -> None:
        targets = []
        for role in self._fleet.roles:
            port = self._port(role.name)
            if port is not None and self._state.process(role.name) is not None:
                labels = {"job": SERVICE_NAMES[role.service], "taskmesh_role": role.role}
                targets.append({"targets": [f"127.0.0.1:{port}"], "labels": labels})
        self.prometheus.scrape(targets)

    def _log(self, role: str) -> Path:
        return self._state.folders.log(role)

    def _port(self, role: str) -> int | None:
        """The port that the role's running process has told its log."""
        lines = self._log(role).read_text().splitlines() if self._log(role).exists() else []
        told = [json.loads(line) for line in lines if '"metrics page opened"' in line]
        process = self._state.process(role)
        if not told or process is None or not is_answering(told[-1]["port"]):
            return None
        return int(told[-1]["port"])


@contextlib.contextmanager
def watched_mesh(program: str, folder: Path) -> Iterator[WatchedMesh]:
    """A mesh in an empty folder, watched by the Prometheus that is started by this program; nothing of it stays."""
    options = Options(seed=1, minutes=1)
    planned = options.fleet()
    fleet = Fleet(PACKAGES | {"trials": TRIALS}, planned.roles, variables={**planned.variables, **VARIABLES})
    folders = Folders(folder / "mesh")
    prometheus = Prometheus(program, folder / "prometheus")
    with locked(folders) as state, (folder / "progress.log").open("w") as out:
        mesh = Mesh(state, Progress(Console(file=out, width=160)), fleet)
        try:
            mesh.up()
            watched = WatchedMesh(mesh, state, fleet, prometheus)
            watched.scrape_all()
            yield watched
            watched.client.close()
        finally:
            prometheus.stop()
            mesh.down(purge=True)
