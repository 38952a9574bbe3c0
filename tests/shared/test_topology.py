"""The topology on a real broker: declared in any order, as narrow as promised, and nothing is dropped."""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

import pika
import pytest

from taskmesh import topology
from taskmesh.errors import BrokerUnavailable, PermanentError
from taskmesh.exchanges import COMMANDS, DEAD, DIRECT, EVENTS, LIFECYCLE
from taskmesh.management import Management
from taskmesh.publishing import Outcome, OutgoingMessage, Publisher


@pytest.fixture
def management(broker):
    with Management(broker.management_url) as client:
        yield client


@pytest.fixture
def declare(broker, management):
    return lambda wanted: topology.declare(wanted, amqp_url=broker.amqp_url, management=management)


@pytest.fixture
def user(broker, management):
    """Makes a broker user with rights on the test's virtual host; returns its AMQP URL."""
    names = []

    def make(rights, tags=()):
        name, password = f"user-{secrets.token_hex(4)}", secrets.token_hex(8)
        names.append(name)
        management.put_user(name, password, tags=tags)
        topology.grant(management, broker.vhost, name, rights)
        return f"amqp://{name}:{password}@{broker.amqp_url.rpartition('@')[2]}"

    yield make
    for name in names:
        management.delete_user(name)


def bindings(management, broker, queue):
    return {(found["source"], found["routing_key"]) for found in management.bindings(broker.vhost, queue)}


def receive(url, queue):
    """The next message of a queue, as method, properties and body; None if none comes within some seconds."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        for method, properties, body in channel.consume(queue, inactivity_timeout=10):
            if method is None:
                return None
            channel.basic_ack(method.delivery_tag)
            return method, properties, body
    finally:
        connection.close()


async def publish(url, *destinations):
    async with Publisher(url, name="test") as publisher:
        messages = [OutgoingMessage(exchange=exchange, routing_key=key, body=b"[]") for exchange, key in destinations]
        return [report.outcome for report in await publisher.publish(messages)]


async def test_services_may_be_set_up_in_any_order_and_again(broker, declare):
    for _ in range(2):
        declare(topology.worker_topology("email", ["billing.document.ready"]))
        declare(topology.worker_topology("billing", []))
        declare(topology.gateway_topology())

    outcomes = await publish(
        broker.amqp_url,
        (COMMANDS, "billing.invoice.issue"),
        (COMMANDS, "billing"),
        (EVENTS, "billing.document.ready"),
        (DIRECT, "email"),
        (DIRECT, "email.events"),
        (DIRECT, "email.control"),
        (LIFECYCLE, "task.running.billing"),
        (LIFECYCLE, "manifest.billing"),
        (DEAD, "billing"),
        (COMMANDS, "nobody.invoice.issue"),
        (EVENTS, "billing.document.ready.twice"),
    )

    assert outcomes == [Outcome.CONFIRMED] * 9 + [Outcome.RETURNED] * 2


def test_a_binding_that_a_service_no_longer_has_is_removed_and_an_operator_s_own_is_kept(broker, declare, management):
    declare(topology.worker_topology("email", ["billing.document.ready", "billing.invoice.issued"]))
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    connection.channel().queue_bind("email.events", "amq.topic", "audit.#")
    connection.close()

    declare(topology.worker_topology("email", ["billing.invoice.issued"]))

    assert bindings(management, broker, "email.events") == {
        (EVENTS, "billing.invoice.issued"),
        (DIRECT, "email.events"),
        ("amq.topic", "audit.#"),
    }


@pytest.mark.parametrize("queue", ["billing", "billing.events", "billing.control", "gateway.lifecycle"])
async def test_a_rejected_message_is_dead_lettered_under_its_queue_s_name(broker, declare, queue):
    declare(topology.gateway_topology())
    declare(topology.worker_topology("billing", []))
    destination = (LIFECYCLE, "task.x.billing") if queue == "gateway.lifecycle" else (DIRECT, queue)
    await publish(broker.amqp_url, destination)
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    channel = connection.channel()
    for method, _, _ in channel.consume(queue, inactivity_timeout=10):
        channel.basic_reject(method.delivery_tag, requeue=False)
        break

    method, properties, body = receive(broker.amqp_url, "gateway.dead-letters")
    connection.close()

    assert (method.exchange, method.routing_key, body) == (DEAD, queue, b"[]")
    assert properties.headers["x-death"][0]["queue"] == queue


def test_every_queue_is_covered_by_exactly_one_policy_that_refuses_instead_of_dropping(declare, management, broker):
    for wanted in (topology.gateway_topology(), topology.worker_topology("billing", [])):
        declare(wanted)

    policies = {policy["name"]: policy for policy in management.policies(broker.vhost)}
    queues = {queue["name"] for queue in management.queues(broker.vhost)}

    assert set(policies) == queues
    assert all(policy["definition"]["overflow"] == "reject-publish" for policy in policies.values())
    # On RabbitMQ 4 a queue without a delivery limit of its own drops what it has delivered 21 times.
    assert all("delivery-limit" in policy["definition"] for policy in policies.values())


async def test_a_worker_s_user_may_publish_in_its_own_name_only(broker, declare, user):
    declare(topology.gateway_topology())
    declare(topology.worker_topology("billing", ["billing.invoice.issued"]))
    declare(topology.worker_topology("email", ["email.message.sent"]))
    url = user(topology.permissions("billing"))

    allowed = await publish(
        url,
        (COMMANDS, "billing.invoice.issue"),
        (COMMANDS, "email.message.send"),
        (EVENTS, "billing.invoice.issued"),
        (LIFECYCLE, "task.running.billing"),
        (LIFECYCLE, "manifest.billing"),
        (DIRECT, "billing"),
        (DIRECT, "billing.events"),
    )
    forbidden = await publish(
        url,
        (EVENTS, "email.message.sent"),
        (LIFECYCLE, "task.running.email"),
        (LIFECYCLE, "task.running.billing.x"),
        (LIFECYCLE, "manifest.email"),
        (DIRECT, "email"),
        (DIRECT, "email.control"),
        (DEAD, "billing"),
        ("", "billing"),
        ("amq.topic", "billing.x"),
        ("no.such.exchange", "billing.x"),
    )

    assert allowed == [Outcome.CONFIRMED] * len(allowed)
    assert forbidden == [Outcome.REFUSED] * len(forbidden)


async def test_the_gateway_s_user_may_command_and_redirect_and_nothing_else(broker, declare, user):
    declare(topology.gateway_topology())
    declare(topology.worker_topology("email", []))
    url = user(topology.permissions("gateway"))

    outcomes = await publish(
        url,
        (COMMANDS, "email.message.send"),
        (DIRECT, "email.control"),
        (LIFECYCLE, "task.running.email"),
        (EVENTS, "email.message.sent"),
        (DEAD, "email"),
    )

    assert outcomes == [Outcome.CONFIRMED] * 3 + [Outcome.REFUSED] * 2


@pytest.mark.parametrize(
    ("service", "own", "foreign"),
    [
        ("billing", ["billing", "billing.events", "billing.control"], ["email", "gateway.lifecycle"]),
        ("gateway", ["gateway.lifecycle", "gateway.dead-letters"], ["billing", "billing.control"]),
    ],
)
def test_a_service_reads_its_own_queues_only_and_configures_nothing(broker, declare, user, service, own, foreign):
    declare(topology.gateway_topology())
    declare(topology.worker_topology("billing", []))
    declare(topology.worker_topology("email", []))
    connection = pika.BlockingConnection(pika.URLParameters(user(topology.permissions(service))))

    for queue in own:
        connection.channel().basic_consume(queue, lambda *_: None)
    for queue in foreign:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
            connection.channel().basic_consume(queue, lambda *_: None)
    for forbidden in (
        lambda channel: channel.queue_declare("another", durable=True),
        lambda channel: channel.queue_bind(own[0], EVENTS, "#"),
        lambda channel: channel.queue_delete(own[0]),
        lambda channel: channel.exchange_declare("another"),
    ):
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
            forbidden(connection.channel())
    connection.close()


@pytest.mark.parametrize("service", ["gateway", "billing"])
def test_the_setup_role_s_rights_are_enough_to_declare(broker, declare, user, service):
    declare(topology.worker_topology("email", []))
    url = user(topology.setup_permissions(service), tags=["policymaker"])
    parts = urlsplit(url)
    wanted = topology.gateway_topology() if service == "gateway" else topology.worker_topology(service, ["a.b.c"])
    address = broker.management_url.rpartition("@")[2]

    with Management(f"http://{parts.username}:{parts.password}@{address}") as own:
        topology.declare(wanted, amqp_url=url, management=own)
        topology.declare(wanted, amqp_url=url, management=own)


def test_a_queue_that_exists_with_another_type_is_a_clear_refusal(broker, declare):
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    connection.channel().queue_declare("billing", durable=True)
    connection.close()

    with pytest.raises(PermanentError, match=r"x-queue-type.*'billing'"):
        declare(topology.worker_topology("billing", []))


def test_a_broker_that_is_away_is_unavailable(broker, management):
    elsewhere = "amqp://a:b@127.0.0.1:1/" + broker.vhost

    with pytest.raises(BrokerUnavailable):
        topology.declare(topology.gateway_topology(), amqp_url=elsewhere, management=management)


@pytest.mark.parametrize("service", ["gateway", "taskmesh", "amq", "Billing", "billing.events", "", "9lives"])
def test_a_name_that_would_collide_cannot_name_a_worker_service(service):
    with pytest.raises(ValueError, match="cannot name"):
        topology.worker_topology(service, [])
