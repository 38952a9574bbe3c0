"""What telemetry costs: throughput and CPU of the gateway and of a worker, with spans and metrics against without.

Both kinds of process run at the same time, and take the load in turns: so whatever else the machine does meets both.
A round's ratio is that of two turns that follow each other; the verdict is about the median of the ratios. The
collector is a process of its own that drops what it gets.

    .venv/bin/python bench/telemetry.py [--rounds 7] [--seconds 5] [--tasks 2000] [--connections 48] [--only gateway]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pika
import psycopg

from meshbench.load import Load, apply
from meshbench.mesh import announce, make_key
from meshbench.processes import Role, plain_environment, running, until
from noop_service import EFFECTS, DoNothing
from taskmesh import celery_protocol
from taskmesh.celery_protocol import TaskMessage
from taskmesh.parts.postgres import create_database
from taskmesh.parts.rabbitmq import create_vhost, in_vhost
from taskmesh.testing.servers import Servers, claim, new_run, release
from taskmesh_local.collector import collecting

SERVICE = Path(__file__).with_name("noop_service.py")
SHARE_ALLOWED = {"worker": 0.10}
"""Of the throughput."""
SECONDS_ALLOWED = {"gateway": 0.057}
"""Of processor time, for 1,000 requests: 8 % of what they took when that was decided. They take a quarter of it by now,
and a share of so little says more of the request than of its telemetry."""


@dataclass(frozen=True)
class Turn:
    """What one process did in its turn."""

    tasks: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.tasks / self.seconds

    @property
    def cpu_per_1000(self) -> float:
        return 1000 * self.cpu_seconds / self.tasks


Turns = Mapping[str, Callable[[], Turn]]
"""What "on" and "off" do when it is their turn."""


def environments(folder: Path, endpoint: str, **variables: str) -> dict[str, dict[str, str]]:
    """The environment of each of the two: "on" has a collector."""
    plain = plain_environment()
    made = {}
    for name in ("off", "on"):
        (folder / name).mkdir(parents=True)
        made[name] = plain | variables | {"TASKMESH_HEALTH_DIR": str(folder / name)}
    made["on"] |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
    return made


# The gateway


def gateway_turn(role: Role, key: str, options: argparse.Namespace) -> Turn:
    load = Load(
        port=role.port(),
        headers=(f"Authorization: Bearer {key}",),
        body=json.dumps({"type": DoNothing.type_name, "payload": {}}),
        connections=options.connections,
        seconds=options.seconds,
    )
    cpu = role.cpu_seconds()
    outcome = asyncio.run(apply(load)).demand_success()
    return Turn(outcome.count, outcome.seconds, role.cpu_seconds() - cpu)


@contextlib.contextmanager
def gateways(
    servers: Servers, folder: Path, endpoint: str, options: argparse.Namespace
) -> Iterator[dict[str, Callable[[], Turn]]]:
    """One gateway with telemetry and one without, on one database."""
    rabbitmq = servers.rabbitmq()
    vhost = f"bench_{secrets.token_hex(4)}"
    create_vhost(rabbitmq.management_url, vhost)
    database_url = create_database(servers.postgres().url, vhost)
    both = environments(
        folder / "gateway",
        endpoint,
        TASKMESH_DATABASE_URL=database_url,
        TASKMESH_AMQP_URL=in_vhost(rabbitmq.amqp_url, vhost),
        TASKMESH_MANAGEMENT_URL=rabbitmq.management_url,
        TASKMESH_HTTP_HOST="127.0.0.1",
        TASKMESH_HTTP_PORT="0",
    )
    gateway = [sys.executable, "-m", "gateway"]
    subprocess.run([*gateway, "setup"], env=both["off"], check=True, stdout=subprocess.DEVNULL)
    asyncio.run(announce(database_url))
    key = make_key(both["off"])
    with contextlib.ExitStack() as stack:
        roles = {
            name: stack.enter_context(running(["-m", "gateway", "api"], environment, "gateway-api.ready"))
            for name, environment in both.items()
        }
        yield {name: lambda role=role: gateway_turn(role, key, options) for name, role in roles.items()}


# A worker


@dataclass
class Worker:
    """A worker with a queue and a database of its own."""

    role: Role
    amqp_url: str
    database_url: str

    def turn(self, count: int) -> Turn:
        """Have it work off a queue that was full before it began."""
        self.role.send(signal.SIGSTOP)
        self._fill(count)
        with psycopg.connect(self.database_url, autocommit=True) as database:
            # Reports and rows of earlier turns would make each turn slower than the one before.
            database.execute("truncate effects, inbox, outbox")
            cpu, begun = self.role.cpu_seconds(), time.monotonic()
            self.role.send(signal.SIGCONT)
            until(lambda: database.execute("select count(*) from effects").fetchone() == (count,))
            return Turn(count, time.monotonic() - begun, self.role.cpu_seconds() - cpu)

    def _fill(self, count: int) -> None:
        with pika.BlockingConnection(pika.URLParameters(self.amqp_url)) as connection:
            channel = connection.channel()
            for _ in range(count):
                traceparent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
                task = TaskMessage(type=DoNothing.type_name, id=uuid4(), payload={}, traceparent=traceparent)
                headers, properties, body = celery_protocol.encode(task)
                channel.basic_publish(
                    "taskmesh.commands",
                    DoNothing.type_name,
                    body,
                    pika.BasicProperties(headers=headers, **properties),
                )


@contextlib.contextmanager
def workers(
    servers: Servers, folder: Path, endpoint: str, options: argparse.Namespace
) -> Iterator[dict[str, Callable[[], Turn]]]:
    """One worker with telemetry and one without."""
    rabbitmq = servers.rabbitmq()
    both = environments(folder / "worker", endpoint, TASKMESH_WORKER_CONCURRENCY="2")
    with contextlib.ExitStack() as stack:
        turns = {}
        for name, environment in both.items():
            vhost = f"bench_{secrets.token_hex(4)}"
            create_vhost(rabbitmq.management_url, vhost)
            amqp_url = in_vhost(rabbitmq.amqp_url, vhost)
            database_url = create_database(servers.postgres().url, vhost)
            environment |= {
                "TASKMESH_AMQP_URL": amqp_url,
                "TASKMESH_DATABASE_URL": database_url,
                "TASKMESH_MANAGEMENT_URL": rabbitmq.management_url,
            }
            subprocess.run(
                [sys.executable, str(SERVICE), "setup"], env=environment, check=True, stdout=subprocess.DEVNULL
            )
            with psycopg.connect(database_url, autocommit=True) as database:
                database.execute(EFFECTS)
            role = stack.enter_context(running([str(SERVICE), "worker"], environment, "bench-worker.ready"))
            worker = Worker(role, amqp_url, database_url)
            turns[name] = lambda worker=worker: worker.turn(options.tasks)
        yield turns


# The comparison


def compare(what: str, turns: Turns, rounds: int) -> bool:
    """Take turns, print what they were like, and say whether telemetry costs what it may."""
    for turn in turns.values():
        turn()
    done: list[dict[str, Turn]] = []
    for number in range(rounds):
        # Whoever comes second has it warmer, or fuller: so each is first as often as the other.
        order = ("off", "on") if number % 2 else ("on", "off")
        done.append({name: turns[name]() for name in order})
        off, on = done[-1]["off"], done[-1]["on"]
        print(
            f"{what} {number + 1}: off {off.rate:6.0f}/s {off.cpu_per_1000:5.2f} s, on {on.rate:6.0f}/s"
            f" {on.cpu_per_1000:5.2f} s, ratio {on.rate / off.rate:.3f}"
        )
    lost = 1 - statistics.median(each["on"].rate / each["off"].rate for each in done)
    dearer = statistics.median(each["on"].cpu_per_1000 / each["off"].cpu_per_1000 for each in done) - 1
    rates = {name: statistics.median(each[name].rate for each in done) for name in ("off", "on")}
    cpus = {name: statistics.median(each[name].cpu_per_1000 for each in done) for name in ("off", "on")}
    more = cpus["on"] - cpus["off"]
    seconds, share = SECONDS_ALLOWED.get(what), SHARE_ALLOWED.get(what)
    fine = (share is None or lost <= share) and (seconds is None or more <= seconds)
    allowed = f"{seconds:.3f} s" if share is None else f"{share:.0%} of throughput"
    print(
        f"{what}: {rates['off']:.0f}/s without, {rates['on']:.0f}/s with telemetry: {lost:.1%} of throughput;"
        f" CPU of 1,000 tasks {cpus['off']:.3f} s and {cpus['on']:.3f} s: {more:+.3f} s, {dearer:+.1%}"
        f" ({allowed} allowed{'' if fine else ', EXCEEDED'})"
    )
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what telemetry costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn of the gateway")
    parser.add_argument("--tasks", type=int, default=2000, help="of a turn of the worker")
    parser.add_argument("--connections", type=int, default=48, help="to the gateway")
    parser.add_argument("--only", choices=("gateway", "worker"))
    options = parser.parse_args()
    run = new_run(on_disk=True)
    claim(run)
    fine = True
    try:
        with tempfile.TemporaryDirectory() as folder, collecting(None) as endpoint:
            for what, kind in (("gateway", gateways), ("worker", workers)):
                if options.only in (None, what):
                    with kind(Servers(run), Path(folder), endpoint, options) as turns:
                        fine &= compare(what, turns, options.rounds)
    finally:
        release(run)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
