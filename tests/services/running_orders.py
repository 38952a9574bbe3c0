"""The service of `orders.py` as running processes, and what a test does to it and sees of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
import pika
import psycopg
from celery import Celery
from kombu import Exchange

from taskmesh import lifecycle
from taskmesh.contracts.lifecycle import LifecycleEvent
from taskmesh.management import Management
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.parts.rabbitmq import create_vhost, delete_vhost, in_vhost
from taskmesh.testing.waiting import eventually
from taskmesh.topology import declare, gateway_topology

SERVICE = Path(__file__).with_name("orders.py")


class Server(Protocol):
    """A broker's administrator."""

    @property
    def amqp_url(self) -> str: ...
    @property
    def management_url(self) -> str: ...


@dataclass
class Orders:
    """The running service, seen from outside."""

    database_url: str
    amqp_url: str
    management_url: str
    vhost: str
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]]
    health: Path
    script: Path = SERVICE

    def spawn(
        self, role: str, *, script: Path | None = None, start_new_session: bool = False, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a role, or a program that stands in for it, and do not wait until it is ready."""
        (self.health / f"orders-{role}.ready").unlink(missing_ok=True)
        with (self.health / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(
                [sys.executable, str(script or self.script), role],
                env=self.environment | variables,
                stdout=log,
                stderr=log,
                start_new_session=start_new_session,
            )
        return self.processes[role]

    def start(self, role: str, **variables: str) -> None:
        """Start a role and wait until it is ready."""
        self.spawn(role, **variables)
        self.wait_until_ready(role)

    def wait_until_ready(self, role: str) -> None:
        log = self.health / f"{role}.log"
        eventually((self.health / f"orders-{role}.ready").exists, seconds=180, explain=lambda: log.read_text()[-2000:])

    def stop_role(self, role: str) -> None:
        """Ask a role to end, and wait until it has."""
        self.processes[role].terminate()
        self.processes[role].wait(timeout=120)

    def stop(self) -> None:
        """End every process, by force where SIGTERM is missed."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def send(self, name: str, /, task_id: str | None = None, **kwargs: Any) -> str:
        """Publish as plain Celery does, without a line of Taskmesh."""
        options = {
            key: kwargs.pop(key)
            for key in ("eta", "countdown", "expires", "link", "link_error", "chain")
            if key in kwargs
        }
        with Celery(broker=self.amqp_url, set_as_current=False) as plain:
            plain.conf.task_create_missing_queues = False
            exchange = Exchange("taskmesh.commands", type="topic", no_declare=True)
            result = plain.send_task(
                name, kwargs=kwargs, task_id=task_id or str(uuid4()), exchange=exchange, routing_key=name, **options
            )
            return str(result.id)

    def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(statement, parameters).fetchall()

    def notes(self, task_id: str) -> list[str]:
        """What the task has written, in order."""
        return [row[0] for row in self.rows("select note from effects where task_id = %s order by id", task_id)]

    def followers(self, task_id: str) -> list[str]:
        """What the tasks that a task started have written."""
        ids = [str(e.task_id) for e in self.events() if str(e.root_id) == task_id and str(e.task_id) != task_id]
        return sorted(note for follower in set(ids) for note in self.notes(follower))

    def state(self, task_id: str) -> str | None:
        rows = self.rows("select state from inbox where task_id = %s", task_id)
        return rows[0][0] if rows else None

    def wait(self, task_id: str, *states: str) -> str:
        """Wait until the inbox says that the task has ended."""
        wanted = states or ("succeeded", "failed", "expired")
        return str(eventually(lambda: (state := self.state(task_id)) in wanted and state))

    def events(self, task_id: str | None = None) -> list[LifecycleEvent]:
        """What the ledger would be told, taken off its queue."""
        connection = pika.BlockingConnection(pika.URLParameters(self.amqp_url))
        channel = connection.channel()
        found: list[LifecycleEvent] = []
        while True:
            method, _, body = channel.basic_get("gateway.lifecycle", auto_ack=True)
            if method is None:
                break
            if method.routing_key.startswith("task."):
                found += lifecycle.decode(body)
        connection.close()
        self._seen += found
        return [event for event in self._seen if task_id is None or str(event.task_id) == task_id]

    def __post_init__(self) -> None:
        self._seen: list[LifecycleEvent] = []

    def dead_letters(self) -> int:
        with pika.BlockingConnection(pika.URLParameters(self.amqp_url)) as connection:
            return int(connection.channel().queue_declare("gateway.dead-letters", passive=True).method.message_count)

    def close_connections(self) -> None:
        """Close every connection to the broker, as a restart of a broker node does."""
        with httpx.Client(base_url=self.management_url) as management:
            found = eventually(lambda: management.get(f"/api/vhosts/{self.vhost}/connections").json())
            for connection in found:
                management.delete(f"/api/connections/{quote(connection['name'], safe='')}")

    def idle(self) -> bool:
        """No message waits and no outbox row is left."""
        return self.rows("select count(*) from outbox where due_at < now() + interval '1 minute'")[0][0] == 0


OrdersT = TypeVar("OrdersT", bound=Orders)


@contextlib.contextmanager
def orders_service(
    postgres: str,
    rabbitmq: Server,
    folder: Path,
    *roles: str,
    script: Path = SERVICE,
    kind: type[OrdersT] = Orders,  # type: ignore[assignment] - a default cannot be of every kind
    start: bool = True,
    **variables: str,
) -> Iterator[OrdersT]:
    """Run the service in a database and a virtual host of its own until the end of the block.

    Args:
        postgres: The administrator's URL.
        rabbitmq: The broker's administrator.
        folder: For logs and health files.
        roles: Which processes to start; a relay and a worker when none is named.
        script: The service's program.
        kind: What a test is given to handle it with.
        start: False leaves it to the test to start processes.
        variables: More environment variables.
    """
    name = f"orders_{uuid4().hex[:12]}"
    database_url = create_database(postgres, name)
    create_vhost(rabbitmq.management_url, name)
    amqp_url = in_vhost(rabbitmq.amqp_url, name)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "OTEL_EXPORTER_OTLP_ENDPOINT"},
        "TASKMESH_DATABASE_URL": database_url,
        "TASKMESH_AMQP_URL": amqp_url,
        "TASKMESH_MANAGEMENT_URL": rabbitmq.management_url,
        "TASKMESH_HEALTH_DIR": str(folder),
        "TASKMESH_SOFT_SHUTDOWN_SECONDS": "5",
        "TASKMESH_RELAY_POLL_SECONDS": "0.2",
        **variables,
    }
    subprocess.run([sys.executable, str(script), "setup"], env=environment, check=True)
    service = kind(database_url, amqp_url, rabbitmq.management_url, name, environment, {}, folder, script)
    with Management(rabbitmq.management_url) as management:
        declare(gateway_topology(), amqp_url=amqp_url, management=management)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create table effects (id bigserial, task_id uuid, note text, attempt int, at timestamptz)")
        connection.execute("create table checked_at_commit (name int unique deferrable initially deferred)")
    wanted = (roles or ("relay", "worker")) if start else ()
    try:
        for role in wanted:
            service.spawn(role)
        for role in wanted:
            service.wait_until_ready(role)
        yield service
    finally:
        service.stop()
        delete_vhost(rabbitmq.management_url, name)
        drop_database(postgres, name)
