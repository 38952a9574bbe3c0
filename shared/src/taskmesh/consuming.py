"""Consuming in batches: one transaction for many messages, acknowledged once it has committed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pika import BasicProperties, spec
from pika.channel import Channel
from pydantic import SecretStr

from taskmesh import amqp, database
from taskmesh.errors import BrokerUnavailable, TaskmeshError, TransientError
from taskmesh.health import Health

logger = logging.getLogger(__name__)

IDLE_BEAT_SECONDS = 1.0


@dataclass(slots=True, eq=False, kw_only=True)
class Delivery:
    """A message as the broker handed it over.

    Attributes:
        exchange, routing_key: As it was published; a dead letter's key is the name of the queue that it died in.
        properties: Basic properties under pika's names, without headers; only those that are set.
        delivery_count: How often it was handed over before: crashes, requeues, drains and lost connections.
    """

    queue: str
    exchange: str
    routing_key: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: bytes = field(repr=False)
    delivery_count: int
    rejection: str | None = field(default=None, init=False)
    tag: int = field(repr=False)

    def reject(self, reason: str) -> None:
        """Have this delivery dead-lettered instead of acknowledged, whatever becomes of the rest of its batch.

        From a queue without a dead-letter exchange it is dropped, so nobody rejects from `gateway.dead-letters`.

        Args:
            reason: Is logged; names the fault and never quotes the message.
        """
        self.rejection = reason


Handler = Callable[[Sequence[Delivery]], Awaitable[object]]
"""Deals with a batch and returns after its commit. It sees a message again after a crash, so it must be idempotent."""


class BatchConsumer:
    """Consumes from queues that exist, and comes back after every loss of the connection or of a queue.

    When the handler raises, all deliveries of the batch go back to their queues after a wait, by `reject` and one by
    one: a `nack` is not counted as a delivery by every RabbitMQ. Unless the error may pass by itself (a TransientError,
    the database away), one message of the batch may be its cause, so as many messages as the batch had are then handled
    one at a time.

    Args:
        queues: Names; each gets its own prefetch of twice the batch size, so that one batch is handled while the next
            one arrives.
        handle: See `Handler`.
        name: What the broker shows as the connection's name.
        batch_size: Most deliveries in a batch.
        batch_wait_seconds: How long the first delivery of a batch waits for company.
        poison_after: A delivery that fails alone, and for no passing reason, is rejected when it was handed over at
            least so many times before; None leaves it to the queue's delivery limit.
        health: Ready while the consumer is attached for the first time, alive while its loop turns.
    """

    def __init__(
        self,
        amqp_url: SecretStr | str,
        queues: Sequence[str],
        handle: Handler,
        *,
        name: str,
        batch_size: int = 200,
        batch_wait_seconds: float = 0.02,
        poison_after: int | None = None,
        health: Health | None = None,
        backoff: amqp.Backoff | None = None,
    ) -> None:
        self._url = amqp_url
        self._queues = tuple(queues)
        self._handle = handle
        self._name = name
        self._batch_size = batch_size
        self._batch_wait = batch_wait_seconds
        self._poison_after = poison_after
        self._health = health or Health(None, name)
        self._handler_backoff = backoff or amqp.Backoff(first_seconds=0.2, longest_seconds=15.0)
        self._singly = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until `stop` is set; then finish the batch in hand and give back what is not begun."""
        backoff = amqp.Backoff()
        outage = False
        while not stop.is_set():
            try:
                async with contextlib.AsyncExitStack() as stack:
                    connection = await amqp.Connection.open(self._url, name=self._name)
                    stack.push_async_callback(connection.close)
                    intake = await _Intake.attach(connection, self._queues, prefetch=2 * self._batch_size)
                    if outage:
                        logger.info("consuming again", extra={"queues": self._queues})
                        outage = False
                    backoff.reset()
                    self._health.ready()
                    await self._consume(intake, stop)
            except TaskmeshError as error:
                if not outage:
                    logger.warning("consumer lost its queues", extra={"queues": self._queues, "reason": str(error)})
                    outage = True
                self._health.beat()
                await _wait(stop, backoff.next())
        self._health.stopped()

    async def _consume(self, intake: _Intake, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._health.beat()
            await intake.arrival(stop, IDLE_BEAT_SECONDS)
            intake.raise_if_closed()
            size = 1 if self._singly else self._batch_size
            if size > len(intake.waiting) > 0:
                await intake.filled(size, stop, self._batch_wait)
            batch = intake.take(size)
            if batch:
                await self._deal_with(intake, batch, stop)

    async def _deal_with(self, intake: _Intake, batch: Sequence[Delivery], stop: asyncio.Event) -> None:
        self._singly = max(0, self._singly - len(batch))
        try:
            await self._handle(batch)
        except Exception as error:
            transient = isinstance(error, TransientError) or database.is_unavailable(error)
            reason = type(error).__name__
            logger.warning("batch failed", exc_info=not transient, extra={"size": len(batch), "reason": reason})
            if not transient and len(batch) > 1:
                self._singly = len(batch)
            if not transient and len(batch) == 1 and self._is_poison(batch[0]):
                batch[0].reject(f"handling it failed too often: {reason}")
                intake.settle(batch)
                return
            await _wait(stop, self._handler_backoff.next())
            intake.requeue(batch)
        else:
            self._handler_backoff.reset()
            intake.settle(batch)

    def _is_poison(self, delivery: Delivery) -> bool:
        return self._poison_after is not None and delivery.delivery_count >= self._poison_after


class _Intake:
    """The deliveries of one channel that nobody has begun with."""

    def __init__(self) -> None:
        self.waiting: deque[Delivery] = deque()
        self._channel: Channel | None = None
        self._moved = asyncio.Event()
        self._closed: asyncio.Future[TaskmeshError] = asyncio.get_running_loop().create_future()

    @classmethod
    async def attach(cls, connection: amqp.Connection, queues: Sequence[str], *, prefetch: int) -> _Intake:
        """Consume from the queues over a channel of the connection.

        Raises:
            TaskmeshError: A queue does not exist, a right is missing, or the connection was lost.
        """
        self = cls()
        channel = self._channel = await connection.channel()
        channel.add_on_close_callback(self._on_close)
        channel.add_on_cancel_callback(self._on_cancel)
        connection.lost.add_done_callback(lambda lost: self._close(lost.result()))
        await connection.call(
            lambda done: channel.basic_qos(prefetch_count=prefetch, callback=done), closed=self._closed
        )
        for queue in queues:
            consume = functools.partial(channel.basic_consume, queue, self._receiver(queue))
            await connection.call(lambda done, consume=consume: consume(callback=done), closed=self._closed)  # type: ignore[misc]
        return self

    def raise_if_closed(self) -> None:
        if self._closed.done():
            raise self._closed.result()

    async def arrival(self, stop: asyncio.Event, longest_seconds: float) -> None:
        """Wait until there is a delivery, the channel's end, or `stop`."""
        await self.filled(1, stop, longest_seconds)

    async def filled(self, size: int, stop: asyncio.Event, longest_seconds: float) -> None:
        """Wait until there are so many deliveries, the channel's end, or `stop`."""
        deadline = time.monotonic() + longest_seconds
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while len(self.waiting) < size and not self._closed.done() and not stop.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._moved.clear()
                moved = asyncio.ensure_future(self._moved.wait())
                await asyncio.wait({moved, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
        finally:
            stopped.cancel()

    def take(self, size: int) -> list[Delivery]:
        """Take the oldest deliveries."""
        return [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]

    def settle(self, batch: Sequence[Delivery]) -> None:
        """Acknowledge the deliveries, and dead-letter those that were rejected."""
        channel = self._open_channel()
        for delivery in batch:
            if delivery.rejection is not None:
                logger.error("delivery rejected", extra={"queue": delivery.queue, "reason": delivery.rejection})
                channel.basic_reject(delivery.tag, requeue=False)
        done = [delivery.tag for delivery in batch if delivery.rejection is None]
        if done:
            # Batches are taken in the order of tags, so every tag up to this one has been dealt with.
            channel.basic_ack(done[-1], multiple=True)

    def requeue(self, batch: Sequence[Delivery]) -> None:
        """Put the deliveries back; each one is counted."""
        channel = self._open_channel()
        for delivery in batch:
            channel.basic_reject(delivery.tag, requeue=delivery.rejection is None)

    def _open_channel(self) -> Any:
        if self._closed.done():
            raise self._closed.result()
        if self._channel is None or not self._channel.is_open:
            raise BrokerUnavailable("the channel is closing")
        return self._channel

    def _receiver(self, queue: str) -> Callable[[Channel, spec.Basic.Deliver, BasicProperties, bytes], None]:
        def receive(_: Channel, method: spec.Basic.Deliver, properties: BasicProperties, body: bytes) -> None:
            self.waiting.append(_delivery(queue, method, properties, body))
            self._moved.set()

        return receive

    def _on_cancel(self, _: object) -> None:
        self._close(BrokerUnavailable("the broker cancelled the consumer: a queue was deleted or moved"))

    def _on_close(self, _: Channel, reason: Exception) -> None:
        self._close(amqp.translate(reason))

    def _close(self, reason: TaskmeshError) -> None:
        if not self._closed.done():
            self._closed.set_result(reason)
        self._moved.set()


def _delivery(queue: str, method: spec.Basic.Deliver, properties: BasicProperties, body: bytes) -> Delivery:
    headers: dict[str, Any] = properties.headers or {}
    count = headers.get("x-delivery-count")
    return Delivery(
        queue=queue,
        exchange=method.exchange,
        routing_key=method.routing_key,
        headers=headers,
        properties={name: value for name, value in vars(properties).items() if value is not None and name != "headers"},
        body=body,
        # Absent on the first delivery.
        delivery_count=count if isinstance(count, int) else 0,
        tag=method.delivery_tag,
    )


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
