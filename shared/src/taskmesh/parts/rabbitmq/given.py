"""What every RabbitMQ server is to us, and one that somebody else runs."""

from __future__ import annotations

from typing import Protocol

import pika
from pika.exceptions import AMQPError

from taskmesh.errors import TaskmeshError
from taskmesh.management import Management
from taskmesh.parts import PartDidNotStart


class Broker(Protocol):
    """A RabbitMQ server with its management API, whoever runs it."""

    @property
    def amqp_url(self) -> str: ...
    @property
    def management_url(self) -> str: ...
    def start(self) -> None: ...
    def is_running(self) -> bool: ...


class GivenRabbitMQ:
    """A server that somebody else runs; its management URL must be an administrator's."""

    def __init__(self, amqp_url: str, management_url: str) -> None:
        self.amqp_url = amqp_url
        self.management_url = management_url

    def start(self) -> None:
        """Check that the server answers.

        Raises:
            PartDidNotStart: It does not.
        """
        if not self.is_running():
            raise PartDidNotStart("RabbitMQ at TASKMESH_AMQP_URL and TASKMESH_MANAGEMENT_URL does not answer.")

    def is_running(self) -> bool:
        """True if the server answers now."""
        return is_answering(self.amqp_url, self.management_url)


def is_answering(amqp_url: str, management_url: str) -> bool:
    """True if the broker takes a connection and its management API answers."""
    try:
        # The management API first: it says nothing when it is not there, where pika logs each refusal as an error.
        with Management(management_url, timeout_seconds=5) as management:
            management.overview()
        parameters = pika.URLParameters(amqp_url)
        parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = 5
        pika.BlockingConnection(parameters).close()
    except (AMQPError, OSError, TaskmeshError):
        return False
    return True
