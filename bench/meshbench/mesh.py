"""A mesh: the gateway and one worker service, of which a case starts the roles that it needs."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pika
import psycopg
from sqlalchemy.ext.asyncio import create_async_engine

from gateway import catalogue
from meshbench.ground import Ground, Place
from meshbench.processes import READY_SECONDS, Role, plain_environment, until
from meshbench.submissions import BATCH, batch
from noop_service import EFFECTS, app
from taskmesh.topology import DEAD_QUEUE, LIFECYCLE_QUEUE

SERVICE = Path(__file__).parents[1] / "noop_service.py"
SCOPES = "tasks:write,tasks:read"
SMALL_BODY_BYTES = 150

ROLES: Mapping[str, tuple[list[str], str]] = {
    "api": (["-m", "gateway", "api"], "gateway-api.ready"),
    "relay": (["-m", "gateway", "relay"], "gateway-relay.ready"),
    "projector": (["-m", "gateway", "projector"], "gateway-projector.ready"),
    "scheduler": (["-m", "gateway", "scheduler"], "gateway-scheduler.ready"),
    "reconciler": (["-m", "gateway", "reconciler"], "gateway-reconciler.ready"),
    "worker": ([str(SERVICE), "worker"], "bench-worker.ready"),
    "worker-relay": ([str(SERVICE), "relay"], "bench-relay.ready"),
}
"""How each role is started, and the file that says that it is ready."""

BEHIND = ("relay", "projector", "worker", "worker-relay")
"""What takes an accepted task further."""


class Mesh:
    """A gateway and the service `bench`, in databases and a virtual host of their own.

    Args:
        variables: More of the environment of every role.
    """

    def __init__(self, ground: Ground, name: str, **variables: str) -> None:
        self._folder = ground.folder / name
        self._folder.mkdir(mode=0o755)
        self.ground = ground
        self.place = ground.place(name)
        self.service_database_url = ground.database(f"{name}_bench")
        self.roles: dict[str, Role] = {}
        # Telemetry has a benchmark of its own; without a collector, as here, it is off.
        gateway = plain_environment() | self.place.environment(self._folder) | variables
        self._environments = {
            "gateway": gateway,
            "bench": gateway | {"TASKMESH_DATABASE_URL": self.service_database_url},
        }
        self.headers = (f"Authorization: Bearer {self._set_up()}",)

    def start(self, *names: str) -> None:
        """Have these roles running, and ready."""
        new = [name for name in names if name not in self.roles]
        for name in new:
            words, ready = ROLES[name]
            self.roles[name] = Role.start(
                words, self._environment(name), log=self._folder / f"{name}.log", ready=self._folder / ready
            )
        for name in new:
            self.roles[name].wait_until_ready()

    def stop(self, *names: str) -> None:
        """Stop these roles, or all."""
        for name in names or tuple(self.roles):
            if name in self.roles:
                self.roles.pop(name).stop()

    def roots(self, *names: str) -> dict[str, int]:
        """The processes of these roles, and those of the servers."""
        return {name: self.roles[name].pid for name in names} | dict(self.ground.roots())

    @property
    def port(self) -> int:
        """Where the api serves."""
        return self.roles["api"].port()

    def gateway_database(self) -> psycopg.Connection:
        return psycopg.connect(self.place.database_url, autocommit=True)

    def service_database(self) -> psycopg.Connection:
        return psycopg.connect(self.service_database_url, autocommit=True)

    def clear(self) -> None:
        """Forget all tasks: drop what waits anywhere, and return when nothing moves any more."""
        while True:
            with self.gateway_database() as ledger, self.service_database() as service:
                empty(ledger, "outbox", "tasks", "task_events", "idempotency_keys")
                empty(service, "outbox", "inbox", "effects")
                left = purge(self.place, "bench", "bench.events", LIFECYCLE_QUEUE, DEAD_QUEUE)
                rows = [
                    count(ledger, "select count(*) from tasks"),
                    count(ledger, "select count(*) from outbox"),
                    count(service, "select count(*) from effects"),
                    count(service, "select count(*) from outbox"),
                ]
                # What was in a worker's hands, or a relay's, has had the time of these statements to show up.
                if left + sum(rows) == 0:
                    return

    def fill(self, tasks: int, *, body_bytes: int = SMALL_BODY_BYTES) -> None:
        """Accept so many tasks, in batches; a multiple of 500 is accepted, or less than that."""
        url = f"http://127.0.0.1:{self.port}/v1/tasks:batchCreate"
        name, _, value = self.headers[0].partition(": ")
        headers = {name: value, "Content-Type": "application/json"}
        with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
            for size in _portions(tasks):
                client.post(url, content=batch(size, body_bytes=body_bytes)).raise_for_status()

    def until_published(self, *, seconds: float = READY_SECONDS) -> None:
        """Wait until everything that the gateway has accepted is in the broker."""
        with self.gateway_database() as ledger:
            until(
                lambda: not count(ledger, "select count(*) from outbox"),
                lambda: "the relay did not publish all",
                seconds=max(seconds, READY_SECONDS),
            )

    def _set_up(self) -> str:
        """Have everything migrated, declared and announced; returns an API key."""
        service = subprocess.Popen(
            [sys.executable, str(SERVICE), "setup"], env=self._environments["bench"], stdout=subprocess.DEVNULL
        )
        gateway = [sys.executable, "-m", "gateway", "setup"]
        subprocess.run(gateway, env=self._environments["gateway"], check=True, stdout=subprocess.DEVNULL)
        key = make_key(self._environments["gateway"])
        if service.wait():
            raise RuntimeError("the service could not be set up")
        with self.service_database() as database:
            database.execute(EFFECTS)
        asyncio.run(announce(self.place.database_url))
        return key

    def _environment(self, role: str) -> dict[str, str]:
        return self._environments["bench" if role.startswith("worker") else "gateway"]


async def announce(database_url: str) -> None:
    """Let the gateway know the one type that there is."""
    engine = create_async_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    async with engine.begin() as connection:
        await catalogue.store(connection, app.manifest().model_copy(update={"announced_at": datetime.now(UTC)}))
    await engine.dispose()


def make_key(environment: Mapping[str, str]) -> str:
    """A new API key of the gateway that the environment describes."""
    words = [sys.executable, "-m", "gateway", "keys", "create", "--name", "bench", "--scopes", SCOPES]
    made = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return made.stdout.split()[-1]


def empty(database: psycopg.Connection, *tables: str) -> None:
    """Drop all rows of the tables, one table at a time: a relay or a worker at work has locks of its own."""
    for table in tables:
        database.execute(f"truncate {table}".encode())


def count(database: psycopg.Connection, statement: str) -> int:
    """The one number that a statement returns."""
    row = database.execute(statement.encode()).fetchone()
    assert row
    return int(row[0])


def purge(place: Place, *queues: str) -> int:
    """Drop what waits in the queues; returns how many messages that were. Queues that do not exist are passed over."""
    dropped = 0
    with pika.BlockingConnection(pika.URLParameters(place.amqp_url)) as connection:
        for queue in queues:
            with contextlib.suppress(pika.exceptions.ChannelClosedByBroker):
                dropped += int(connection.channel().queue_purge(queue).method.message_count)
    return dropped


def waiting(place: Place, queue: str) -> int:
    """How many messages a queue has ready."""
    with pika.BlockingConnection(pika.URLParameters(place.amqp_url)) as connection:
        return int(connection.channel().queue_declare(queue, passive=True).method.message_count)


def _portions(tasks: int) -> Iterable[int]:
    while tasks > 0:
        yield min(tasks, BATCH)
        tasks -= BATCH
