"""The batch consumer on a real broker: nothing is acknowledged before its time, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib

import pika
import pytest

from taskmesh import amqp, topology
from taskmesh.consuming import BatchConsumer
from taskmesh.errors import BrokerUnavailable
from taskmesh.exchanges import DIRECT
from taskmesh.health import Health
from taskmesh.management import Management
from taskmesh.publishing import OutgoingMessage, Publisher
from taskmesh.testing.proxy import TcpProxy


@pytest.fixture(autouse=True)
def _mesh(broker):
    with Management(broker.management_url) as management:
        for wanted in (topology.gateway_topology(), topology.worker_topology("billing", [])):
            topology.declare(wanted, amqp_url=broker.amqp_url, management=management)


async def fill(broker, *bodies, queue="billing"):
    async with Publisher(broker.amqp_url, name="test") as publisher:
        await publisher.publish([OutgoingMessage(exchange=DIRECT, routing_key=queue, body=body) for body in bodies])


def waiting(broker, queue):
    """How many messages a queue holds once nobody consumes from it."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.amqp_url))
    try:
        return connection.channel().queue_declare(queue, passive=True).method.message_count
    finally:
        connection.close()


class Handled:
    """A handler that keeps what it saw, and may be told what to do; `until` waits for what it saw."""

    def __init__(self, act=None):
        self.batches = []
        self._act = act
        self._changed = asyncio.Event()

    async def __call__(self, deliveries):
        self.batches.append([delivery.body for delivery in deliveries])
        self._changed.set()
        if self._act is not None:
            await self._act(deliveries)

    @property
    def bodies(self):
        return [body for batch in self.batches for body in batch]

    async def until(self, condition):
        async with asyncio.timeout(15):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def consuming(url, handle, *, queues=("billing",), **options):
    stop = asyncio.Event()
    options.setdefault("backoff", amqp.Backoff(first_seconds=0.01, longest_seconds=0.05))
    consumer = BatchConsumer(url, queues, handle, name="test", **options)
    running = asyncio.create_task(consumer.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(running, 15)


async def test_deliveries_come_in_batches_and_are_acknowledged_after_the_handler_returns(broker, tmp_path):
    handled = Handled()
    await fill(broker, *(b"%d" % number for number in range(25)))

    async with consuming(broker.amqp_url, handled, batch_size=10, health=Health(tmp_path, "test")):
        await handled.until(lambda seen: len(seen.bodies) == 25)
        assert (tmp_path / "test.ready").exists()

    assert handled.bodies == [b"%d" % number for number in range(25)]
    assert max(len(batch) for batch in handled.batches) == 10
    assert waiting(broker, "billing") == 0
    assert not (tmp_path / "test.ready").exists()


async def test_several_queues_share_a_batch_and_each_delivery_says_where_it_is_from(broker):
    seen = []

    async def act(deliveries):
        seen.extend((delivery.queue, delivery.routing_key, delivery.exchange) for delivery in deliveries)

    handled = Handled(act)
    await fill(broker, b"a")
    await fill(broker, b"b", queue="billing.events")

    async with consuming(broker.amqp_url, handled, queues=["billing", "billing.events"]):
        await handled.until(lambda handled: len(handled.bodies) == 2)

    assert sorted(seen) == [("billing", "billing", DIRECT), ("billing.events", "billing.events", DIRECT)]


async def test_a_rejected_delivery_is_dead_lettered_and_the_rest_of_its_batch_acknowledged(broker):
    async def act(deliveries):
        for delivery in deliveries:
            if delivery.body in {b"1", b"4"}:
                delivery.reject("not for us")

    handled, dead = Handled(act), Handled()
    await fill(broker, *(b"%d" % number for number in range(5)))

    async with consuming(broker.amqp_url, handled):
        await handled.until(lambda seen: len(seen.bodies) == 5)
        async with consuming(broker.amqp_url, dead, queues=["gateway.dead-letters"]):
            await dead.until(lambda seen: len(seen.bodies) == 2)

    assert sorted(dead.bodies) == [b"1", b"4"]
    assert waiting(broker, "billing") == 0


async def test_a_batch_that_failed_for_a_passing_reason_comes_again_and_is_counted(broker):
    counts = []

    async def act(deliveries):
        counts.append([delivery.delivery_count for delivery in deliveries])
        if len(counts) <= 2:
            raise BrokerUnavailable("the database is away, say")

    handled = Handled(act)
    await fill(broker, b"a", b"b", b"c")

    async with consuming(broker.amqp_url, handled):
        await handled.until(lambda seen: len(seen.batches) == 3)

    assert counts == [[0] * 3, [1] * 3, [2] * 3]
    assert waiting(broker, "billing") == 0


async def test_one_poisonous_message_is_found_and_parked_and_the_others_are_handled(broker):
    async def act(deliveries):
        if any(delivery.body == b"bad" for delivery in deliveries):
            raise KeyError("a mistake of ours")
        done.extend(delivery.body for delivery in deliveries)

    done = []
    handled, dead = Handled(act), Handled()
    await fill(broker, b"1", b"2", b"bad", b"3", b"4")

    async with (
        consuming(broker.amqp_url, handled, poison_after=3),
        consuming(broker.amqp_url, dead, queues=["gateway.dead-letters"]),
    ):
        await dead.until(lambda seen: seen.bodies == [b"bad"])

    assert sorted(done) == [b"1", b"2", b"3", b"4"]
    assert waiting(broker, "billing") == 0


async def test_a_stop_finishes_the_batch_in_hand_and_gives_back_the_rest(broker):
    begun, finish = asyncio.Event(), asyncio.Event()

    async def act(_):
        begun.set()
        await finish.wait()

    handled = Handled(act)
    await fill(broker, *(b"%d" % number for number in range(10)))

    async with consuming(broker.amqp_url, handled, batch_size=4) as stop:
        await begun.wait()
        stop.set()
        finish.set()

    assert handled.bodies == [b"0", b"1", b"2", b"3"]
    assert waiting(broker, "billing") == 6


async def test_what_was_not_acknowledged_when_the_connection_was_cut_comes_again(broker):
    async with TcpProxy(broker.amqp_url) as proxy:

        async def act(_):
            if proxy.accepted == 1:
                proxy.cut()
                await asyncio.sleep(0)

        handled = Handled(act)
        await fill(broker, b"a", b"b")

        async with consuming(proxy.url, handled):
            await handled.until(lambda seen: len(seen.bodies) == 4)

    assert handled.bodies == [b"a", b"b", b"a", b"b"]
    assert waiting(broker, "billing") == 0


async def test_a_queue_that_does_not_exist_yet_is_waited_for(broker, caplog):
    handled = Handled()

    async with TcpProxy(broker.amqp_url) as proxy, consuming(proxy.url, handled, queues=["email"]):
        async with asyncio.timeout(15):
            while proxy.accepted < 2:  # noqa: ASYNC110 - the proxy only counts
                await asyncio.sleep(0.01)
        with Management(broker.management_url) as management:
            email = topology.worker_topology("email", [])
            await asyncio.to_thread(topology.declare, email, amqp_url=broker.amqp_url, management=management)
        await fill(broker, b"hello", queue="email")
        await handled.until(lambda seen: seen.bodies == [b"hello"])

    assert caplog.text.count("consumer lost its queues") == 1


async def test_messages_wait_while_the_broker_is_down(broker):
    handled = Handled()

    async with TcpProxy(broker.amqp_url) as proxy, consuming(proxy.url, handled):
        await fill(broker, b"1")
        await handled.until(lambda seen: seen.bodies == [b"1"])
        await proxy.refuse()
        await fill(broker, b"2")
        await proxy.accept()
        await handled.until(lambda seen: seen.bodies[-1] == b"2")

    assert waiting(broker, "billing") == 0
