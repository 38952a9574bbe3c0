"""The gateway as running processes, and what a test sees in its ledger."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
from psycopg.rows import dict_row

from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.testing.waiting import eventually

ENDED = ("succeeded", "failed", "expired", "cancelled")


@dataclass
class Gateway:
    """Its roles, each a process of its own."""

    database_url: str
    environment: dict[str, str]
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def spawn(self, role: str, *, script: Path | None = None) -> None:
        """Start a role, or a program that stands in for it, and do not wait until it is ready."""
        (self.folder / f"gateway-{role}.ready").unlink(missing_ok=True)
        program = [str(script)] if script else ["-m", "gateway"]
        with (self.folder / f"gateway-{role}.log").open("wb") as log:
            self.processes[role] = subprocess.Popen(
                [sys.executable, *program, role], env=self.environment, stdout=log, stderr=log
            )

    def start(self, role: str) -> None:
        """Start a role and wait until it is ready."""
        self.spawn(role)
        self.wait_until_ready(role)

    def wait_until_ready(self, role: str) -> None:
        log = self.folder / f"gateway-{role}.log"
        eventually((self.folder / f"gateway-{role}.ready").exists, seconds=180, explain=lambda: log.read_text()[-2000:])

    def stop_role(self, role: str) -> None:
        """Ask a role to end, and wait until it has."""
        self.processes[role].terminate()
        self.processes[role].wait(timeout=120)

    def stop(self) -> None:
        """End every process."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def rows(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Read the ledger; nothing while its database is away."""
        try:
            with psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row) as connection:
                return connection.execute(statement, parameters).fetchall()
        except psycopg.OperationalError:
            return []

    def task(self, task_id: str) -> dict[str, Any] | None:
        """What the ledger says of a task."""
        return next(iter(self.rows("select * from tasks where id = %s", task_id)), None)

    def outcome(self, task_id: str) -> dict[str, Any]:
        """Wait until the ledger says that the task has ended."""
        return eventually(
            lambda: (task := self.task(task_id)) and task["state"] in ENDED and task,
            explain=lambda: f"the ledger says {self.task(task_id)}",
        )

    def letters(self, task_id: str) -> list[dict[str, Any]]:
        """The dead letters of a task."""
        return self.rows("select * from dead_letters where task_id = %s", task_id)

    def outbox(self) -> int:
        """How many rows wait to be published."""
        return int(self.rows("select count(*) from outbox")[0]["count"])

    def http(self, scopes: str = "tasks:write,tasks:read") -> httpx.Client:
        """A caller who may do that much."""
        words = [
            sys.executable,
            "-m",
            "gateway",
            "keys",
            "create",
            "--name",
            "test",
            "--scopes",
            scopes,
        ]
        made = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", (self.folder / "gateway-api.log").read_text())
        assert found
        headers = {"Authorization": f"Bearer {made.stdout.split()[-1]}"}
        return httpx.Client(base_url=found[0], headers=headers, timeout=30, trust_env=False)


@contextlib.contextmanager
def running_gateway(
    postgres: str, amqp_url: str, management_url: str, folder: Path, *roles: str, **variables: str
) -> Iterator[Gateway]:
    """Run the gateway in a database of its own until the end of the block.

    Args:
        postgres: The administrator's URL.
        amqp_url: Of the virtual host that it shares with the services.
        management_url: The broker's administrator's.
        folder: For logs and health files.
        roles: Which processes to start.
        variables: More environment variables.
    """
    name = f"gateway_{uuid4().hex[:12]}"
    database_url = create_database(postgres, name)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "OTEL_EXPORTER_OTLP_ENDPOINT"},
        "TASKMESH_DATABASE_URL": database_url,
        "TASKMESH_AMQP_URL": amqp_url,
        "TASKMESH_MANAGEMENT_URL": management_url,
        "TASKMESH_HEALTH_DIR": str(folder),
        "TASKMESH_HTTP_HOST": "127.0.0.1",
        "TASKMESH_HTTP_PORT": "0",
        "TASKMESH_RELAY_POLL_SECONDS": "0.2",
        **variables,
    }
    subprocess.run([sys.executable, "-m", "gateway", "setup"], env=environment, check=True)
    gateway = Gateway(database_url, environment, folder)
    try:
        for role in roles:
            gateway.spawn(role)
        for role in roles:
            gateway.wait_until_ready(role)
        yield gateway
    finally:
        gateway.stop()
        drop_database(postgres, name)
