"""Where RabbitMQ 3.10 and 4 differ, and that Taskmesh does not mind; docs/rabbitmq.md names these tests.

Each runs on whatever release the other tests run on, and says what that one does.
"""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from taskmesh import amqp, celery_protocol, topology
from taskmesh.celery_protocol import TaskMessage
from taskmesh.errors import PermanentError
from taskmesh.exchanges import COMMANDS
from taskmesh.management import Management
from taskmesh.parts.rabbitmq.programs import wanted
from taskmesh.publishing import Outcome, OutgoingMessage, Publisher
from taskmesh.testing.waiting import eventually

MIB = 1024**2


@pytest.fixture
def management(broker):
    with Management(broker.management_url) as client:
        yield client


@pytest.fixture
def release(management):
    """The first number of the broker's version."""
    return int(management.overview()["rabbitmq_version"].partition(".")[0])


@pytest.fixture
def channel(broker):
    connection = pika.BlockingConnection(amqp.parameters(broker.amqp_url, name="test"))
    channel = connection.channel()
    channel.confirm_delivery()
    yield channel
    if connection.is_open:
        connection.close()


def declare(channel, name="plain", **arguments):
    """A quorum queue that no policy of ours covers."""
    channel.queue_declare(name, durable=True, arguments={**topology.QUEUE_ARGUMENTS, **arguments})
    return name


def get(channel, queue, *, auto_ack=False):
    """The next message of the queue; None if it has none after all."""

    def look():
        method, properties, body = channel.basic_get(queue, auto_ack=auto_ack)
        return (method, properties, body) if method else None

    try:
        return eventually(look, seconds=2)
    except pytest.fail.Exception:
        return None


def put(channel, queue, body=b"x", **properties):
    channel.basic_publish("", queue, body, pika.BasicProperties(**properties), mandatory=True)


def give_back(channel, queue, *, times):
    """Take the message and put it back so many times; returns how often it came."""
    for came in range(times):
        if (delivery := get(channel, queue)) is None:
            return came
        channel.basic_reject(delivery[0].delivery_tag, requeue=True)
    return times


def test_the_broker_is_of_the_release_that_was_asked_for(release):
    assert wanted() in (None, str(release))


def test_a_queue_without_a_policy_drops_a_message_on_4_only(channel, release):
    """4 delivers it 21 times and forgets it; 3.10 never ends."""
    queue = declare(channel)
    put(channel, queue)

    assert give_back(channel, queue, times=30) == (21 if release >= 4 else 30)


@pytest.mark.parametrize("queue", ["billing", "billing.events"])
def test_our_policies_make_a_message_s_end_the_same_dead_letter(channel, management, broker, monkeypatch, queue):
    """One delivery more than the limit, then the dead queue; only the broker's own marks differ."""
    monkeypatch.setattr(topology, "WORK_DELIVERY_LIMIT", 3)
    for wanted_topology in (topology.gateway_topology(), topology.worker_topology("billing", [])):
        topology.declare(wanted_topology, amqp_url=broker.amqp_url, management=management)
    put(channel, queue, headers={"id": "1"})

    assert give_back(channel, queue, times=10) == 4
    _, properties, body = get(channel, topology.DEAD_QUEUE)

    assert body == b"x"
    assert properties.headers["id"] == "1"
    [death] = properties.headers["x-death"]
    assert (death["queue"], death["reason"], death["count"]) == (queue, "delivery_limit", 1)


def test_a_dead_letter_carries_its_last_death_on_4_only(channel, release):
    """And its count of deliveries is no count of attempts on either: nothing of ours reads it."""
    dead = declare(channel, "dead")
    queue = declare(channel, **{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    put(channel, queue)
    give_back(channel, queue, times=1)
    method, _, _ = get(channel, queue)
    channel.basic_reject(method.delivery_tag, requeue=False)

    headers = get(channel, dead)[1].headers

    assert ("x-last-death-queue" in headers) == (release >= 4)
    assert headers["x-first-death-queue"] == queue
    assert headers["x-delivery-count"] == (1 if release >= 4 else 0)


def test_the_first_delivery_carries_a_count_on_3_only(channel, release):
    """Later ones carry it on both, and only redeliveries are counted."""
    queue = declare(channel)
    put(channel, queue)

    method, properties, _ = get(channel, queue)
    channel.basic_reject(method.delivery_tag, requeue=True)

    assert (properties.headers or {}).get("x-delivery-count") == (None if release >= 4 else 0)
    assert get(channel, queue)[1].headers["x-delivery-count"] == 1


def test_a_message_that_is_sent_on_with_the_marks_of_its_death_is_dropped_on_3_only(channel, release):
    """3.10 takes it for one that goes in a circle. So whoever replays a dead letter takes the marks off."""
    dead = declare(channel, "dead")
    queue = declare(channel, **{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead, "x-delivery-limit": 1})
    marks = [
        {
            "count": 1,
            "reason": reason,
            "queue": where,
            "exchange": "",
            "routing-keys": [where],
            "time": datetime.now(UTC),
        }
        for reason, where in (("delivery_limit", queue), ("expired", dead))
    ]
    put(channel, queue, headers={"x-death": marks})

    assert give_back(channel, queue, times=5) == 2

    assert (get(channel, dead) is not None) == (release >= 4)


def test_an_urgent_message_overtakes_on_4_only(channel, release):
    """4 knows two levels and lets two urgent ones pass for each other one; 3.10 ignores priorities."""
    queue = declare(channel)
    for number in range(4):
        put(channel, queue, f"{number}".encode(), priority=0)
    for number in range(4, 8):
        put(channel, queue, f"{number}".encode(), priority=9)

    order = [int(get(channel, queue, auto_ack=True)[2]) for _ in range(8)]

    assert (order == list(range(8))) == (release < 4)
    assert [number for number in order if number < 4] == [0, 1, 2, 3]
    assert [number for number in order if number >= 4] == [4, 5, 6, 7]
    if release >= 4:
        assert sum(number >= 4 for number in order[:4]) >= 2


async def test_a_message_of_17_mib_is_refused_on_4_only(broker, channel, release):
    """The limit was 128 MiB. The publisher is told, and what it published besides arrives."""
    queue = declare(channel)
    messages = [OutgoingMessage(exchange="", routing_key=queue, body=body) for body in (b"1", b"x" * (17 * MIB), b"2")]

    async with Publisher(broker.amqp_url, name="test") as publisher:
        reports = await publisher.publish(messages)

    large = Outcome.REFUSED if release >= 4 else Outcome.CONFIRMED
    assert [report.outcome for report in reports] == [Outcome.CONFIRMED, large, Outcome.CONFIRMED]


def test_a_delivery_mode_that_does_not_exist_is_refused_on_3_only(channel, release):
    queue = declare(channel)

    if release >= 4:
        put(channel, queue, delivery_mode=77)
    else:
        with pytest.raises(ChannelClosedByBroker, match="delivery_mode_unknown"):
            put(channel, queue, delivery_mode=77)


def test_a_consumer_may_hold_a_task_for_a_day_where_a_policy_can_say_so(broker, management, release):
    """3.10 refuses the policy's key; there the broker's own configuration has to allow it."""
    topology.declare(topology.worker_topology("billing", []), amqp_url=broker.amqp_url, management=management)

    definitions = {policy["name"]: policy["definition"] for policy in management.policies(broker.vhost)}

    allowed = topology.CONSUMER_TIMEOUT_MILLISECONDS if release >= 4 else None
    assert {definition.get("consumer-timeout") for definition in definitions.values()} == {allowed}
    if release < 4:
        with pytest.raises(PermanentError, match="not recognised"):
            management.put_policy(
                broker.vhost, "p", pattern="^p$", definition={"consumer-timeout": 1}, apply_to="queues"
            )


async def test_a_command_of_celery_s_arrives_as_it_was_sent(broker, channel, management):
    """Its headers are whole numbers, nulls, lists and tables: 4 stores messages in another form than 3.10."""
    topology.declare(topology.worker_topology("billing", []), amqp_url=broker.amqp_url, management=management)
    message = TaskMessage(type="billing.x", id=uuid4(), payload={"n": 1}, headers={"of_ours": 2.5, "list": [1, None]})
    sent = celery_protocol.command(message)
    outgoing = OutgoingMessage(
        exchange=COMMANDS,
        routing_key="billing.x",
        body=sent.body,
        headers=sent.headers,
        properties=sent.properties,
    )

    async with Publisher(broker.amqp_url, name="test") as publisher:
        [report] = await publisher.publish([outgoing])
    _, properties, body = get(channel, "billing")

    assert report.outcome is Outcome.CONFIRMED
    assert body == sent.body
    received = {name: value for name, value in properties.headers.items() if name != "x-delivery-count"}
    assert received == sent.headers
