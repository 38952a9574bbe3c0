"""RabbitMQ for a laptop and for tests: a private node, a container, or a server that is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from taskmesh.parts import packages
from taskmesh.parts.rabbitmq import programs
from taskmesh.parts.rabbitmq.container import DockerRabbitMQ, docker_client
from taskmesh.parts.rabbitmq.given import Broker, GivenRabbitMQ, is_answering
from taskmesh.parts.rabbitmq.node import RabbitMQ
from taskmesh.parts.rabbitmq.users import (
    VHOST,
    ServiceUsers,
    create_observer,
    create_service_users,
    create_vhost,
    delete_vhost,
    in_vhost,
    vhost_of,
)

__all__ = [
    "VHOST",
    "Broker",
    "DockerRabbitMQ",
    "GivenRabbitMQ",
    "RabbitMQ",
    "ServiceUsers",
    "create_observer",
    "create_service_users",
    "create_vhost",
    "delete_vhost",
    "find",
    "in_vhost",
    "is_answering",
    "vhost_of",
]


def find(folder: Path, *, say: Callable[[str], None], install: bool = True) -> RabbitMQ | DockerRabbitMQ:
    """The best broker this machine can run: an installed server, else Docker, else one from the package manager.

    `TASKMESH_RABBITMQ=4` asks for that release series: one that is installed, else one unpacked for us alone.

    Raises:
        PartMissing: None of these, in one line that says what to do.
    """
    series = programs.wanted()
    if programs.of(series):
        return RabbitMQ(folder)
    if series is not None:
        raise programs.missing(series)
    if docker_client():
        say("RabbitMQ is not installed; using Docker")
        return DockerRabbitMQ(folder)
    if install:
        packages.install("rabbitmq-server", say=say)
        if programs.of(None):
            return RabbitMQ(folder)
    raise programs.missing()
