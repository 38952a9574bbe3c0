"""What a run stands on: a PostgreSQL and a RabbitMQ of its own."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg

from taskmesh.parts.postgres import Postgres, create_database
from taskmesh.parts.rabbitmq import Broker, RabbitMQ, create_vhost, find, in_vhost
from taskmesh.testing.servers import claim, new_run, release, release_abandoned


@dataclass(frozen=True, slots=True)
class Place:
    """A database and a virtual host for one contestant."""

    database_url: str
    amqp_url: str
    management_url: str

    def environment(self, folder: Path) -> dict[str, str]:
        """What tells a process where it belongs; the folder is for its log and its health files."""
        return {
            "TASKMESH_DATABASE_URL": self.database_url,
            "TASKMESH_AMQP_URL": self.amqp_url,
            "TASKMESH_MANAGEMENT_URL": self.management_url,
            "TASKMESH_HEALTH_DIR": str(folder),
            "TASKMESH_HTTP_HOST": "127.0.0.1",
            "TASKMESH_HTTP_PORT": "0",
        }


@dataclass(frozen=True, slots=True)
class Ground:
    """Servers that write to disk before they say so, as those of a deployment do.

    Attributes:
        folder: For logs and whatever else is gone after the run.
    """

    folder: Path
    postgres: Postgres
    rabbitmq: Broker

    def place(self, name: str) -> Place:
        """A new place, empty."""
        unique = f"{name}_{secrets.token_hex(3)}"
        create_vhost(self.rabbitmq.management_url, unique)
        return Place(
            create_database(self.postgres.url, unique),
            in_vhost(self.rabbitmq.amqp_url, unique),
            self.rabbitmq.management_url,
        )

    def database(self, name: str) -> str:
        """The URL of a new database."""
        return create_database(self.postgres.url, f"{name}_{secrets.token_hex(3)}")

    def roots(self) -> Mapping[str, int]:
        """The servers' processes; a container's are not ours to see."""
        pids = {}
        if self.postgres.process:
            pids["postgres"] = self.postgres.process.pid
        if isinstance(self.rabbitmq, RabbitMQ) and self.rabbitmq.process:
            pids["rabbitmq"] = self.rabbitmq.process.pid
        return pids


@contextlib.contextmanager
def standing() -> Iterator[Ground]:
    """Start both servers for the block; afterwards they are gone with their data."""
    release_abandoned()
    run = new_run(on_disk=True)
    claim(run)
    try:
        run.mkdir(mode=0o755, exist_ok=True)
        postgres = Postgres(run / "postgres")
        postgres.start()
        with psycopg.connect(postgres.url, autocommit=True) as database:
            # When a transaction was committed is what latency is counted to; nothing else tells without taking part.
            database.execute("alter system set track_commit_timestamp = on")
        postgres.stop()
        postgres.start()
        rabbitmq = find(run / "rabbitmq", say=print)
        rabbitmq.start()
        yield Ground(run, postgres, rabbitmq)
    finally:
        release(run)
