"""What the rights of a deployment do not allow is refused: by PostgreSQL, by RabbitMQ, and by its management API.

That the mesh runs with exactly these rights is seen where it runs: `tests/deploy/test_containers.py`, `tests/flows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pika
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ProbableAccessDeniedError

from taskmesh.database import migrate
from taskmesh.management import Management
from taskmesh.parts.postgres import ServiceDatabase
from taskmesh.parts.rabbitmq import create_observer, create_service_users
from taskmesh.topology import declare, gateway_topology, worker_topology

SERVICES = ("gateway", "billing", "email")
ACCESS_REFUSED = 403


@dataclass(frozen=True)
class Broker:
    """A broker with the whole topology, and the URLs of every user."""

    amqp: dict[str, str]
    management: dict[str, str]
    vhost: str


@pytest.fixture(scope="module")
def mesh(rabbitmq) -> Iterator[Broker]:
    from taskmesh.parts.rabbitmq import create_vhost, delete_vhost, in_vhost
    from taskmesh.testing.plugin import TestBroker

    vhost = "test-privileges"
    create_vhost(rabbitmq.management_url, vhost)
    broker = TestBroker(in_vhost(rabbitmq.amqp_url, vhost), rabbitmq.management_url, vhost)
    amqp, management = {}, {"observer": create_observer(broker, vhost)}
    topologies = {"gateway": gateway_topology()} | {name: worker_topology(name, []) for name in SERVICES[1:]}
    for service in SERVICES:
        users = create_service_users(broker, vhost, service)
        amqp |= {service: users.amqp_url, f"{service}-setup": users.setup_amqp_url}
        management[f"{service}-setup"] = users.setup_management_url
        management[service] = users.setup_management_url.replace(
            users.setup_management_url.partition("//")[2].partition("@")[0],
            users.amqp_url.partition("//")[2].partition("@")[0],
        )
        with Management(users.setup_management_url) as api:
            declare(topologies[service], amqp_url=users.setup_amqp_url, management=api)
    observer = management["observer"].partition("//")[2].partition("@")[0]
    amqp["observer"] = amqp["email"].replace(amqp["email"].partition("//")[2].partition("@")[0], observer)
    yield Broker(amqp, management, vhost)
    delete_vhost(rabbitmq.management_url, vhost)


def publish(exchange: str, key: str) -> Callable[[BlockingChannel], object]:
    return lambda channel: channel.basic_publish(exchange, key, b"{}", mandatory=True)


def get(queue: str) -> Callable[[BlockingChannel], object]:
    return lambda channel: channel.basic_get(queue)


QUORUM = {"x-queue-type": "quorum"}
ALLOWED: list[tuple[str, str, Callable[[BlockingChannel], object]]] = [
    ("email", "a command to billing", publish("taskmesh.commands", "billing.invoice.issue")),
    ("email", "an event in its own name", publish("taskmesh.events", "email.message.sent")),
    ("email", "a report in its own name", publish("taskmesh.lifecycle", "task.succeeded.email")),
    ("email", "its own queue", get("email")),
    ("gateway", "dead letters", get("gateway.dead-letters")),
]
FORBIDDEN: list[tuple[str, str, Callable[[BlockingChannel], object]]] = [
    ("email", "an event in billing's name", publish("taskmesh.events", "billing.invoice.issued")),
    ("email", "a report in billing's name", publish("taskmesh.lifecycle", "task.succeeded.billing")),
    ("email", "a manifest in billing's name", publish("taskmesh.lifecycle", "manifest.billing")),
    ("email", "a message into billing's queue", publish("taskmesh.direct", "billing")),
    ("email", "a control message to billing", publish("taskmesh.direct", "billing.control")),
    ("email", "a dead letter of its own making", publish("taskmesh.dead", "billing")),
    ("email", "a message past every exchange", publish("", "billing")),
    ("email", "billing's queue", get("billing")),
    ("email", "billing's control queue", get("billing.control")),
    ("email", "the gateway's reports", get("gateway.lifecycle")),
    ("email", "the dead letters", get("gateway.dead-letters")),
    ("email", "a queue of its own choice", lambda it: it.queue_declare("email.copy", durable=True, arguments=QUORUM)),
    ("email", "the end of its queue", lambda it: it.queue_delete("email")),
    ("email", "another exchange", lambda it: it.exchange_declare("taskmesh.other", "topic", durable=True)),
    ("email", "the end of an exchange", lambda it: it.exchange_delete("taskmesh.events")),
    ("email", "to hear all events", lambda it: it.queue_bind("email.events", "taskmesh.events", "#")),
    ("gateway", "an event", publish("taskmesh.events", "billing.invoice.issued")),
    ("gateway", "a worker's queue", get("billing")),
    ("billing-setup", "what waits in its own queue", get("billing")),
    ("billing-setup", "the end of email's queue", lambda it: it.queue_delete("email")),
    ("billing-setup", "to bind email's queue", lambda it: it.queue_bind("email", "taskmesh.commands", "billing.#")),
    ("observer", "a command", publish("taskmesh.commands", "billing.invoice.issue")),
    ("observer", "a queue", get("billing")),
]


def is_refused(url: str, act: Callable[[BlockingChannel], object]) -> bool:
    """True if the broker refuses for the lack of a right; anything else that fails is an error."""
    try:
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            act(channel)
    except ChannelClosedByBroker as error:
        assert error.reply_code == ACCESS_REFUSED, error
        return True
    except ProbableAccessDeniedError:
        return True
    except pika.exceptions.UnroutableError:
        # Nobody listens: it was taken all the same.
        return False
    return False


@pytest.mark.parametrize(("user", "what", "act"), ALLOWED, ids=[f"{user}-{what}" for user, what, _ in ALLOWED])
def test_a_broker_user_is_let_do_what_it_has_to(mesh, user, what, act):
    assert not is_refused(mesh.amqp[user], act)


@pytest.mark.parametrize(("user", "what", "act"), FORBIDDEN, ids=[f"{user}-{what}" for user, what, _ in FORBIDDEN])
def test_a_broker_user_is_refused_everything_else(mesh, user, what, act):
    assert is_refused(mesh.amqp[user], act)


@pytest.mark.parametrize(
    ("user", "method", "path"),
    [
        ("email", "GET", "queues/{vhost}"),
        ("observer", "DELETE", "queues/{vhost}/email"),
        ("observer", "PUT", "policies/{vhost}/email"),
        ("observer", "PUT", "users/mallory"),
        ("billing-setup", "PUT", "users/mallory"),
        ("billing-setup", "PUT", "permissions/{vhost}/billing"),
    ],
)
def test_the_management_api_refuses_who_may_not(mesh, user, method, path):
    body = {"pattern": ".*", "definition": {"max-length": 1}, "password": "x", "tags": "administrator"}
    body |= {"configure": ".*", "write": ".*", "read": ".*"}

    answer = httpx.request(
        method, f"{mesh.management[user]}/api/{path.format(vhost=mesh.vhost)}", json=body, trust_env=False
    )

    assert answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}


@pytest.fixture
def databases(service_database) -> dict[str, ServiceDatabase]:
    found = {service: service_database(service) for service in ("billing", "email")}
    migrate(found["billing"].owner_url, scripts=None)
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "create table mine (id int)",
        "drop table inbox",
        "alter table inbox add column mine int",
        "truncate outbox",
        "create role mallory",
        "create database mallory",
        "create schema mallory",
        "copy inbox to program 'true'",
        "select pg_read_file('/etc/passwd')",
    ],
)
def test_the_narrow_role_of_a_database_has_its_rows_and_nothing_else(databases, statement):
    with psycopg.connect(databases["billing"].url, autocommit=True) as connection:
        assert connection.execute("select count(*) from inbox").fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


@pytest.mark.parametrize("role", ["owner_url", "url"])
def test_no_service_enters_anothers_database(databases, role):
    own, others = getattr(databases["email"], role), databases["billing"].url
    intruding = own.rpartition("/")[0] + "/" + others.rpartition("/")[2]

    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(intruding)
