"""Connections to RabbitMQ over AMQP 0-9-1, and pika's errors translated once into ours."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, Self

import pika
import pika.data
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.channel import Channel
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ChannelError,
    ConnectionClosed,
    ReentrancyError,
    StreamLostError,
)
from pydantic import SecretStr

from taskmesh import field_tables
from taskmesh.errors import BrokerUnavailable, PermanentError, TaskmeshError

CONNECT_TIMEOUT_SECONDS = 10.0
HEARTBEAT_SECONDS = 30
BLOCKED_TIMEOUT_SECONDS = 300
"""How long a connection that the broker blocks (low on memory or disk) is kept.

Long, because a new connection is blocked as well, but only once it has published: each one would leave another copy of
the same messages in the broker's receive buffer.
"""

PRECONDITION_FAILED = 406
# 403 a right is missing, 404 no such exchange or queue, 405 somebody else's, 406 the wrong type or value.
REFUSALS = frozenset({403, 404, 405, PRECONDITION_FAILED})

FOREIGN_ERRORS = (AMQPError, ChannelError, ReentrancyError, AMQPConnectorException, OSError, TimeoutError)
"""Everything that pika, or the socket below it, raises for reasons outside this program."""


# A time limit of 2.5 s is a header of Celery's, and must survive a relay, a dead letter and a replay. pika 1.4 refuses
# to write AMQP doubles, and reads them as whole numbers.
_encode_value_without_floats = pika.data.encode_value


def _encode_value(pieces: list[bytes], value: Any) -> int:
    if isinstance(value, float):
        pieces.append(struct.pack(">cd", b"d", value))
        return 9
    size: int = _encode_value_without_floats(pieces, value)
    return size


# pika calls both through its module.
pika.data.encode_value = _encode_value
pika.data.decode_table = field_tables.read_table


class BrokerRefusal(PermanentError):
    """The broker closed the channel because of what was asked of it.

    Args:
        reply_code: One of AMQP's, which are HTTP-like: 403, 404, 405 or 406.
    """

    code = "broker_refusal"

    def __init__(self, reply_code: int, reply_text: str) -> None:
        super().__init__(f"the broker refused: {reply_text}")
        self.reply_code = reply_code


def translate(error: BaseException) -> TaskmeshError:
    """Return what a foreign error means: refused for good, or the broker is away.

    The message names the kind and the broker's own words, and never the address: pika's connect errors hold it.
    """
    if isinstance(error, TaskmeshError):
        return error
    kind = type(error).__name__
    if isinstance(error, ChannelClosedByBroker):
        if error.reply_code in REFUSALS:
            return BrokerRefusal(error.reply_code, error.reply_text)
        return BrokerUnavailable(f"the broker closed the channel: {error.reply_code} {error.reply_text}")
    if isinstance(error, ConnectionClosed):
        return BrokerUnavailable(f"the connection was closed: {error.reply_code} {error.reply_text}")
    return BrokerUnavailable(f"the broker cannot be reached: {kind}")


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Raise what `translate` says in place of every foreign error in the block."""
    try:
        yield
    except FOREIGN_ERRORS as error:
        raise translate(error) from error


def parameters(url: SecretStr | str, *, name: str) -> pika.URLParameters:
    """Return pika's parameters for a URL; `amqps://` verifies the broker's certificate.

    Args:
        name: What the broker shows as the connection's name.
    """
    found = pika.URLParameters(url.get_secret_value() if isinstance(url, SecretStr) else url)
    found.heartbeat = HEARTBEAT_SECONDS
    found.blocked_connection_timeout = BLOCKED_TIMEOUT_SECONDS
    found.socket_timeout = CONNECT_TIMEOUT_SECONDS
    found.stack_timeout = CONNECT_TIMEOUT_SECONDS
    found.client_properties = {"connection_name": name, "product": "taskmesh"}
    return found


class Backoff:
    """Growing waits between attempts to get a lost server back.

    Each wait is drawn between half and all of the step, so that many processes do not come back in the same moment.
    """

    def __init__(self, *, first_seconds: float = 0.1, longest_seconds: float = 5.0) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self._step = first_seconds

    def next(self) -> float:
        """Return the seconds to wait now, and make the next wait longer."""
        step = self._step
        self._step = min(step * 2, self._longest)
        return step * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing

    def reset(self) -> None:
        """Start small again; called when an attempt has succeeded."""
        self._step = self._first


class Connection:
    """One open connection. It does not come back by itself: who owns it opens another when `lost` is done."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._connection: AsyncioConnection | None = None
        self._opened: asyncio.Future[None] = loop.create_future()
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._aborted = False
        self.lost: asyncio.Future[TaskmeshError] = loop.create_future()
        """Done once the connection is gone (or could not be made), with the reason."""

    @classmethod
    async def open(cls, url: SecretStr | str, *, name: str) -> Self:
        """Connect, or raise BrokerUnavailable after `CONNECT_TIMEOUT_SECONDS` at the latest."""
        self = cls()
        with translating():
            self._connection = AsyncioConnection(
                parameters(url, name=name),
                on_open_callback=self._on_open,
                on_open_error_callback=self._on_lost,
                on_close_callback=self._on_lost,
            )
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
        waiting: set[asyncio.Future[Any]] = {self._opened, self.lost}
        try:
            await asyncio.wait(waiting, timeout=CONNECT_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.abort()
            raise
        if self.lost.done():
            raise self.lost.result()
        if not self._opened.done():
            self.abort()
            raise BrokerUnavailable("the broker did not complete the connection in time")
        return self

    @property
    def is_open(self) -> bool:
        """True until the connection is lost, aborted, or being closed."""
        return self._connection is not None and not self._aborted and bool(self._connection.is_open)

    @property
    def is_blocked(self) -> bool:
        """True while the broker, low on memory or disk, reads nothing from this connection."""
        return not self._unblocked.is_set()

    async def unblocked(self) -> None:
        """Wait until the broker reads from this connection, or the connection is lost."""
        await self._unblocked.wait()

    async def channel(self) -> Channel:
        """Open a channel."""
        connection = self._connection
        assert connection is not None
        channel: Channel = await self.call(lambda done: connection.channel(on_open_callback=done))
        return channel

    async def call(
        self, start: Callable[[Callable[[Any], None]], object], *, closed: asyncio.Future[TaskmeshError] | None = None
    ) -> Any:
        """Start one of pika's calls that answer through a callback, and wait for the answer.

        Args:
            start: Is given the callback to hand to pika.
            closed: Done when the call's channel is closed, with the reason.

        Raises:
            BrokerUnavailable: The connection was lost, or the broker did not answer in time.
            TaskmeshError: The reason why the channel was closed.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_answer(value: Any) -> None:
            if not answer.done():
                answer.set_result(value)

        with translating():
            start(on_answer)
        endings = [ending for ending in (closed, self.lost) if ending is not None]
        waiting: set[asyncio.Future[Any]] = {answer, *endings}
        await asyncio.wait(waiting, timeout=CONNECT_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        answer.cancel()
        for ending in endings:
            if ending.done():
                raise ending.result()
        raise BrokerUnavailable("the broker did not answer in time")

    async def close(self, *, timeout_seconds: float = 2.0) -> None:
        """Send what is still buffered and say goodbye; cut the connection when the broker does not answer."""
        if self._connection is not None and self._connection.is_open:
            with contextlib.suppress(*FOREIGN_ERRORS):
                self._connection.close()
            await asyncio.wait({self.lost}, timeout=timeout_seconds)
        self.abort()

    def abort(self) -> None:
        """Cut the connection without a word; does nothing when it is gone already."""
        if self._connection is None or self.lost.done():
            return
        self._aborted = True
        with contextlib.suppress(*FOREIGN_ERRORS):
            # pika's close() waits for the broker, which is the one that does not answer.
            self._connection._terminate_stream(StreamLostError("aborted"))  # noqa: SLF001

    def _on_open(self, _: object) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    def _on_lost(self, _: object, error: BaseException) -> None:
        if not self.lost.done():
            self.lost.set_result(translate(error))
        self._unblocked.set()

    def _on_blocked(self, *_: object) -> None:
        self._unblocked.clear()

    def _on_unblocked(self, *_: object) -> None:
        self._unblocked.set()
