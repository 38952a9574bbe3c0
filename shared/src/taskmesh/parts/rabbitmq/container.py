"""A RabbitMQ that Docker runs."""

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
from taskmesh.parts.rabbitmq.given import is_answering
from taskmesh.parts.rabbitmq.node import ADMIN, START_SECONDS, STOP_SECONDS


class DockerRabbitMQ:
    """A RabbitMQ container that stays when we end, with its data in a volume of the same name."""

    IMAGE = "rabbitmq:4-management"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = folder / "rabbitmq-container.json"

    @property
    def amqp_url(self) -> str:
        record = records.read(self._record)
        return f"amqp://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['amqp']}/%2F"

    @property
    def management_url(self) -> str:
        record = records.read(self._record)
        return f"http://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['management']}"

    @property
    def name(self) -> str:
        return f"taskmesh-{hashlib.sha256(bytes(self._folder.resolve())).hexdigest()[:10]}"

    def start(self) -> None:
        """Start the container unless it runs already, and return when the broker answers.

        Raises:
            PartDidNotStart: It did not answer within two minutes.
        """
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        if self._records_a_container() and self.is_running():
            return
        record = records.read(self._record)
        record.setdefault("password", secrets.token_urlsafe(24))
        record.setdefault("ports", {"amqp": free_port(), "management": free_port()})
        records.write(self._record, record)
        # Testcontainers' reaper removes what its process has started when that process ends; ours must stay.
        testcontainers_config.ryuk_disabled = True
        container = (
            DockerContainer(self.IMAGE)
            .with_name(self.name)
            # The hostname is part of the data folder's name: it must not change from start to start.
            .with_kwargs(hostname=self.name, remove=True)
            .with_volume_mapping(self.name, "/var/lib/rabbitmq", "rw")
            .with_env("RABBITMQ_DEFAULT_USER", ADMIN)
            .with_env("RABBITMQ_DEFAULT_PASS", record["password"])
        )
        # A pair of address and port is what Docker's own API takes; testcontainers' type does not say so.
        addresses: dict[Any, Any] = {
            5672: ("127.0.0.1", record["ports"]["amqp"]),
            15672: ("127.0.0.1", record["ports"]["management"]),
        }
        container.ports = addresses
        container.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.is_running():
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"RabbitMQ did not answer; see `docker logs {self.name}`")
            time.sleep(0.5)

    def is_running(self) -> bool:
        return self._records_a_container() and is_answering(self.amqp_url, self.management_url)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """Stop the container; the data stays in its volume."""
        if container := self._container():
            container.stop(timeout=int(timeout_seconds))

    def kill(self) -> None:
        """Kill the broker as a crash would."""
        if container := self._container():
            container.kill()

    def purge(self) -> None:
        """Stop the container and delete its data."""
        self.stop()
        if docker := docker_client():
            with contextlib.suppress(Exception):
                docker.volumes.get(self.name).remove(force=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _records_a_container(self) -> bool:
        return "ports" in records.read(self._record)

    def _container(self) -> Any:  # The docker package has no types.
        docker = docker_client()
        found = docker.containers.list(filters={"name": f"^{self.name}$"}) if docker else []
        return found[0] if found else None


def docker_client() -> Any:  # The docker package has no types.
    """A client of the Docker daemon; None if none answers."""
    with contextlib.suppress(Exception):
        import docker

        client = docker.from_env(timeout=5)
        client.ping()
        return client
    return None
