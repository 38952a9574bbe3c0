"""PostgreSQL in a container, for `TASKMESH_TEST_BACKEND=containers`."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from taskmesh.parts import PartDidNotStart, records
from taskmesh.parts.ports import free_port
from taskmesh.parts.postgres import ADMIN, START_SECONDS, GivenPostgres


class DockerPostgres:
    """A PostgreSQL container that outlives the process that starts it; its data ends with it."""

    IMAGE = "postgres:18"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = folder / "postgres-container.json"
        self._name = f"taskmesh-pg-{hashlib.sha256(bytes(folder)).hexdigest()[:10]}"

    @property
    def url(self) -> str:
        """The administrator's URL of the database `postgres`; known after the start."""
        record = records.read(self._record)
        return f"postgresql://{ADMIN}:{record['password']}@127.0.0.1:{record['port']}/postgres"

    def is_running(self) -> bool:
        return self._record.exists() and GivenPostgres(self.url).is_running()

    def start(self) -> None:
        """Start the container unless it runs already, and return when the server answers.

        Raises:
            PartDidNotStart: It did not answer within a minute.
        """
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        if self.is_running():
            return
        record: dict[str, Any] = {"password": secrets.token_urlsafe(24), "port": free_port()}
        # Testcontainers' reaper would remove the container when this one of several test workers ends.
        testcontainers_config.ryuk_disabled = True
        container = (
            DockerContainer(self.IMAGE)
            .with_name(self._name)
            .with_kwargs(remove=True)
            .with_command("postgres -c max_connections=300 -c fsync=off")
            .with_env("POSTGRES_USER", ADMIN)
            .with_env("POSTGRES_PASSWORD", record["password"])
            .with_env("POSTGRES_DB", "postgres")
        )
        # A pair of address and port is what Docker's own API takes; testcontainers' type does not say so.
        addresses: dict[Any, Any] = {5432: ("127.0.0.1", record["port"])}
        container.ports = addresses
        container.start()
        records.write(self._record, record)
        deadline = time.monotonic() + START_SECONDS
        while not self.is_running():
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"PostgreSQL in the container {self._name} did not answer; see `docker logs`.")
            time.sleep(0.2)

    def purge(self) -> None:
        """Stop the container, which deletes it and its data."""
        if self._record.exists():
            import docker

            with contextlib.suppress(docker.errors.DockerException):
                docker.from_env().containers.get(self._name).kill()
        shutil.rmtree(self._folder, ignore_errors=True)
