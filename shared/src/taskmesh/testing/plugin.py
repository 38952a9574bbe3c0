"""Fixtures for the tests of a Taskmesh service; loaded by pytest itself once the library is installed.

`postgres`, `database_url`, `service_database`, `rabbitmq`, `broker`, `smtp_sink`, `otlp_sink`, `payload_factory`.
The servers are real. The first test that asks for one starts it; all workers of pytest-xdist share it; it is stopped
at the end of the run, or at the start of the next one if this run is killed. See `taskmesh.testing.servers` for the
environment variables that choose other servers.
"""

# Nothing heavy is imported up here: every pytest run of every project with the library installed loads this module.
from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from taskmesh.parts.postgres import ServiceDatabase
    from taskmesh.parts.rabbitmq import Broker
    from taskmesh.testing.otlp import OtlpSink
    from taskmesh.testing.payloads import PayloadFactory
    from taskmesh.testing.servers import Servers
    from taskmesh.testing.smtp import SmtpSink

_FOLDER = "taskmesh_servers"


@dataclass(frozen=True, slots=True)
class TestBroker:
    """A virtual host of its own for one test.

    Attributes:
        amqp_url: The administrator's URL of the virtual host.
        management_url: The management API, for the whole server.
        vhost: The virtual host's name.
    """

    __test__ = False

    amqp_url: str
    management_url: str
    vhost: str


def pytest_configure(config: pytest.Config) -> None:
    worker_input: dict[str, Any] | None = getattr(config, "workerinput", None)
    config.stash[_run] = worker_input[_FOLDER] if worker_input else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # pytest-xdist's WorkerController
    """Tell a worker of pytest-xdist which folder to share; runs in the controlling process."""
    node.workerinput[_FOLDER] = str(_claim(node.config))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_run, None)
    if folder and not hasattr(config, "workerinput"):
        from taskmesh.testing.servers import release

        release(Path(folder))


_run: pytest.StashKey[str | None] = pytest.StashKey()


def _claim(config: pytest.Config) -> Path:
    folder = config.stash[_run]
    if folder is None:
        from taskmesh.testing import servers

        servers.release_abandoned()
        run = servers.new_run()
        servers.claim(run)
        config.stash[_run] = folder = str(run)
    return Path(folder)


@pytest.fixture(scope="session")
def _servers(pytestconfig: pytest.Config) -> Servers:
    from taskmesh.testing.servers import Servers

    return Servers(_claim(pytestconfig))


@pytest.fixture(scope="session")
def postgres(_servers: Servers) -> str:
    """The administrator's URL of a real PostgreSQL."""
    return _servers.postgres().url


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """An empty database for one test; its user may do everything in it."""
    from taskmesh.parts.postgres import create_database, drop_database

    name = f"test_{secrets.token_hex(6)}"
    yield create_database(postgres, name)
    drop_database(postgres, name)


@pytest.fixture
def service_database(postgres: str) -> Iterator[Callable[[str], ServiceDatabase]]:
    """Call it with a service's name for an empty database with the two roles of a real deployment."""
    from taskmesh.parts.postgres import create_service_database, drop_service_database

    names: list[str] = []

    def create(service: str) -> ServiceDatabase:
        names.append(f"{service}_{secrets.token_hex(6)}")
        return create_service_database(postgres, names[-1])

    yield create
    for name in names:
        drop_service_database(postgres, name)


@pytest.fixture(scope="session")
def rabbitmq(_servers: Servers) -> Broker:
    """A real RabbitMQ: `.amqp_url` and `.management_url` are the administrator's."""
    return _servers.rabbitmq()


@pytest.fixture
def broker(rabbitmq: Broker) -> Iterator[TestBroker]:
    """A virtual host for one test."""
    from taskmesh.parts.rabbitmq import create_vhost, delete_vhost, in_vhost

    vhost = f"test-{secrets.token_hex(6)}"
    create_vhost(rabbitmq.management_url, vhost)
    yield TestBroker(in_vhost(rabbitmq.amqp_url, vhost), rabbitmq.management_url, vhost)
    delete_vhost(rabbitmq.management_url, vhost)


@pytest.fixture
def smtp_sink() -> Iterator[SmtpSink]:
    """A real SMTP server that keeps what it receives, and answers as the test tells it to."""
    from taskmesh.testing.smtp import SmtpSink

    with SmtpSink() as sink:
        yield sink


@pytest.fixture
def otlp_sink() -> Iterator[OtlpSink]:
    """A real OTLP/HTTP receiver that keeps the spans it receives."""
    from taskmesh.testing.otlp import OtlpSink

    with OtlpSink() as sink:
        yield sink


@pytest.fixture
def payload_factory() -> PayloadFactory:
    """Call it with a contract, or a JSON Schema, for a payload that fits; keyword arguments replace fields."""
    from taskmesh.testing.payloads import PayloadFactory

    return PayloadFactory()
