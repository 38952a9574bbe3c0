"""Publishing with an answer for every message: confirmed, returned, refused, or unknown.

Publisher confirms are pipelined, which is eight times as fast as waiting for each. What makes it delicate: a refused
publish (no right, no such exchange) closes the channel and takes the answers of the whole window with it. The publisher
then finds out which message it was, by sending again with care, so one bad message harms no other.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from pika import BasicProperties, DeliveryMode, spec
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelWrongStateError, ConnectionWrongStateError
from pika.frame import Method
from pydantic import SecretStr

from taskmesh import amqp
from taskmesh.errors import BrokerUnavailable, TaskmeshError

logger = logging.getLogger(__name__)

WINDOW = 500
"""Messages on their way at a time; more gains nothing on one node, and what is in flight is repeated after a loss."""
CONFIRM_TIMEOUT_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingMessage:
    """A message to publish; `properties` are basic properties under pika's names.

    It is published persistent, and with a `message_id`, unless its properties say otherwise.
    """

    exchange: str
    routing_key: str
    body: bytes = field(repr=False)
    headers: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    mandatory: bool = True
    """A message that no queue takes is reported `returned`; otherwise the broker drops it and confirms."""


class Outcome(StrEnum):
    CONFIRMED = "confirmed"
    """Every queue it was routed to has it on disk."""
    RETURNED = "returned"
    """No queue took it; there is no copy of it."""
    REFUSED = "refused"
    """The broker does not take it: no right, no such exchange, queue full. There may be a copy in another queue."""
    UNKNOWN = "unknown"
    """The answer did not come. It may have been published, so publish it again."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one message."""

    outcome: Outcome
    reason: str | None = None
    """In the broker's words; None when confirmed."""
    settled_ns: int = field(default_factory=time.time_ns, compare=False)
    """When the answer came, in nanoseconds of Unix time."""


class Publisher:
    """Publishes batches over one connection, which it opens when needed and opens again after a loss.

    Args:
        amqp_url: `amqp://` or `amqps://`.
        name: What the broker shows as the connection's name.
        window: Most messages without an answer at a time.
        confirm_timeout_seconds: Longest wait without any answer; what is open then is `unknown`.
    """

    def __init__(
        self,
        amqp_url: SecretStr | str,
        *,
        name: str,
        window: int = WINDOW,
        confirm_timeout_seconds: float = CONFIRM_TIMEOUT_SECONDS,
    ) -> None:
        self._url = amqp_url
        self._name = name
        self._window = window
        self._timeout = confirm_timeout_seconds
        self._connection: amqp.Connection | None = None
        self._channel: _ConfirmChannel | None = None
        self._backoff = amqp.Backoff()
        self._connect_not_before = 0.0
        # One batch at a time: a refused publish is traced by what else is on the channel.
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = self._channel = None

    async def connected(self) -> None:
        """Return when there is a connection that the broker reads from; connect if there is none.

        Raises:
            BrokerUnavailable: One attempt has failed. The next call waits a little longer before it tries.
        """
        async with self._turn:
            await self._ready()

    async def publish(self, messages: Sequence[OutgoingMessage]) -> list[Report]:
        """Publish the messages and return one report for each, in their order.

        Returns for every state of the broker, and within the confirm timeout of its last sign of life.
        """
        async with self._turn:
            batch = _Batch(messages)
            try:
                await self._publish(batch)
            except TaskmeshError as error:
                batch.settle_rest(Outcome.UNKNOWN, str(error))
            return batch.reports()

    async def _publish(self, batch: _Batch) -> None:
        if await self._send(batch, batch.open(), window=self._window) is None:
            return
        # The channel was closed. Rights and exchanges decide by exchange and key, so one message of each pair, alone on
        # the channel, speaks for the others.
        for group in batch.open_by_destination():
            refusal = await self._send(batch, group[:1], window=1)
            if refusal is not None:
                spokesman_only = refusal.reply_code == amqp.PRECONDITION_FAILED
                batch.settle(group[:1] if spokesman_only else group, Outcome.REFUSED, str(refusal))
        if await self._send(batch, batch.open(), window=self._window) is None:
            return
        # A message was refused for what is in it, such as another's user_id.
        for index in batch.open():
            refusal = await self._send(batch, [index], window=1)
            if refusal is not None:
                batch.settle([index], Outcome.REFUSED, str(refusal))

    async def _send(self, batch: _Batch, indexes: Sequence[int], *, window: int) -> amqp.BrokerRefusal | None:
        """Send messages and collect their answers; return the reason if the broker closed the channel for one of them.

        Raises:
            TaskmeshError: The connection was lost, or no answer came; the messages are left open.
        """
        if not indexes:
            return None
        channel = await self._ready()
        for index in indexes:
            if channel.closed.done():
                break
            while channel.in_flight >= window and not channel.closed.done():
                await self._answer(channel)
            channel.publish(batch, index)
        while channel.in_flight and not channel.closed.done():
            await self._answer(channel)
        if not channel.closed.done():
            return None
        reason = channel.closed.result()
        if isinstance(reason, amqp.BrokerRefusal):
            return reason
        raise reason

    async def _answer(self, channel: _ConfirmChannel) -> None:
        """Wait for the next answer."""
        try:
            async with asyncio.timeout(self._timeout):
                await channel.moved()
        except TimeoutError as error:
            channel.abandon()
            connection = self._connection
            if connection is not None and not connection.is_blocked:
                # Silent though not blocked: the peer is gone, or as good as gone. A blocked connection is kept; a
                # new one would be blocked as well, after leaving another copy of the same messages in the broker.
                connection.abort()
            raise BrokerUnavailable(f"the broker gave no confirm within {self._timeout:g} s") from error

    async def _ready(self) -> _ConfirmChannel:
        """Return an open channel in confirm mode, on a connection that the broker reads from."""
        connection = self._connection
        if connection is None or not connection.is_open:
            connection = await self._connect()
        if connection.is_blocked:
            try:
                async with asyncio.timeout(self._timeout):
                    await connection.unblocked()
            except TimeoutError as error:
                raise BrokerUnavailable("the broker blocks publishers: it is low on memory or disk") from error
        if self._channel is None or self._channel.closed.done():
            self._channel = await _ConfirmChannel.open(connection)
        return self._channel

    async def _connect(self) -> amqp.Connection:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._connect_not_before - loop.time()))
        self._channel = None
        try:
            self._connection = await amqp.Connection.open(self._url, name=self._name)
        except BrokerUnavailable:
            self._connect_not_before = loop.time() + self._backoff.next()
            raise
        self._backoff.reset()
        return self._connection


class _Batch:
    """Messages and what became of them."""

    def __init__(self, messages: Sequence[OutgoingMessage]) -> None:
        self.messages = messages
        self._reports: list[Report | None] = [None] * len(messages)

    def settle(self, indexes: Iterable[int], outcome: Outcome, reason: str | None = None) -> None:
        for index in indexes:
            if self._reports[index] is None:
                self._reports[index] = Report(outcome, reason)

    def settle_rest(self, outcome: Outcome, reason: str) -> None:
        self.settle(self.open(), outcome, reason)

    def open(self) -> list[int]:
        return [index for index, report in enumerate(self._reports) if report is None]

    def open_by_destination(self) -> list[list[int]]:
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index in self.open():
            message = self.messages[index]
            groups[message.exchange, message.routing_key].append(index)
        return list(groups.values())

    def reports(self) -> list[Report]:
        return [report for report in self._reports if report is not None]


@dataclass(slots=True, eq=False)
class _Flight:
    """A message that was sent and not answered yet."""

    batch: _Batch
    index: int
    key: tuple[str, str, str]
    returned: str | None = None


class _ConfirmChannel:
    """A channel in confirm mode, with what is in flight on it by delivery tag."""

    def __init__(self, connection: amqp.Connection, channel: Channel) -> None:
        self._channel = channel
        self._last_tag = 0
        # In the order of their tags, as dictionaries keep it.
        self._flights: dict[int, _Flight] = {}
        # Mandatory messages by what a return shows of them. Returns come in the order of publishing, and each before
        # its message's ack.
        self._returnable: dict[tuple[str, str, str], deque[_Flight]] = {}
        self._moved = asyncio.Event()
        self.closed: asyncio.Future[TaskmeshError] = asyncio.get_running_loop().create_future()
        channel.add_on_close_callback(self._on_close)
        channel.add_on_return_callback(self._on_return)
        # The channel's own callback does not come when the connection is aborted.
        connection.lost.add_done_callback(lambda lost: self._close(lost.result()))

    @classmethod
    async def open(cls, connection: amqp.Connection) -> Self:
        channel = await connection.channel()
        self = cls(connection, channel)
        await connection.call(
            lambda done: channel.confirm_delivery(self._on_confirm, callback=done), closed=self.closed
        )
        return self

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    async def moved(self) -> None:
        """Wait for an answer, or for the channel's end."""
        self._moved.clear()
        await self._moved.wait()

    def abandon(self) -> None:
        """Forget what is in flight; later answers to it are ignored."""
        self._flights.clear()
        self._returnable.clear()

    def publish(self, batch: _Batch, index: int) -> None:
        message = batch.messages[index]
        try:
            properties = BasicProperties(**{"delivery_mode": DeliveryMode.Persistent.value, **message.properties})
            properties.headers = dict(message.headers)
            properties.message_id = properties.message_id or str(uuid4())
            self._channel.basic_publish(
                message.exchange, message.routing_key, message.body, properties, mandatory=message.mandatory
            )
        except (ChannelWrongStateError, ConnectionWrongStateError):
            # Its close callback is on its way; the message was not sent.
            self._close(BrokerUnavailable("the channel is closing"))
            return
        except (AMQPError, struct.error, TypeError, ValueError, AssertionError) as error:
            # pika encodes a whole message before it sends the first byte, so the channel is still sound.
            batch.settle([index], Outcome.REFUSED, f"cannot be encoded: {type(error).__name__}")
            return
        self._last_tag += 1
        flight = _Flight(batch, index, (properties.message_id, message.exchange, message.routing_key))
        self._flights[self._last_tag] = flight
        if message.mandatory:
            self._returnable.setdefault(flight.key, deque()).append(flight)

    def _on_return(self, _: Channel, method: spec.Basic.Return, properties: BasicProperties, __: bytes) -> None:
        waiting = self._returnable.get((properties.message_id or "", method.exchange, method.routing_key), ())
        for flight in waiting:
            if flight.returned is None:
                flight.returned = f"{method.reply_code} {method.reply_text}"
                return

    def _on_confirm(self, frame: Method[spec.Basic.Ack | spec.Basic.Nack]) -> None:
        tag, multiple = frame.method.delivery_tag, frame.method.multiple
        refused = isinstance(frame.method, spec.Basic.Nack)
        tags = list(takewhile(lambda open_tag: open_tag <= tag, self._flights)) if multiple else [tag]
        for answered in tags:
            flight = self._flights.pop(answered, None)
            if flight is not None:
                self._settle(flight, refused=refused)
        self._moved.set()

    def _settle(self, flight: _Flight, *, refused: bool) -> None:
        waiting = self._returnable.get(flight.key)
        if waiting is not None and flight in waiting:
            waiting.remove(flight)
            if not waiting:
                del self._returnable[flight.key]
        if refused:
            flight.batch.settle(
                [flight.index], Outcome.REFUSED, "the broker refused it: a queue is full or not available"
            )
        elif flight.returned is not None:
            flight.batch.settle([flight.index], Outcome.RETURNED, flight.returned)
        else:
            flight.batch.settle([flight.index], Outcome.CONFIRMED)

    def _on_close(self, _: Channel, reason: Exception) -> None:
        self._close(amqp.translate(reason))

    def _close(self, reason: TaskmeshError) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)
        self._moved.set()
