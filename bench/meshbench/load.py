"""The load: requests over connections that are kept open, at the greatest rate or at a fixed one.

`python -m meshbench.load` takes a `Load` as JSON from standard input and prints an `Outcome`: a process of its own, so
that what it costs is not charged to anybody else. Raw protocols instead of an HTTP client, which would cost more than
the servers that are measured.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import cast

import uvloop

from meshbench.figures import latencies

SENT_AT = b"1000000000.000000"
"""Stands in a request's body for the time at which the request is due, in seconds since 1970."""

PATIENCE_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests to one server.

    Attributes:
        paths: Taken in turn.
        body: Sent with each request; a GET has none.
        headers: Lines without their ends.
        rate: Requests a second, each due at its time whether or not earlier ones are answered; None has each
            connection send its next request when its last one is answered.
        seconds: How long requests become due.
    """

    port: int
    method: str = "POST"
    paths: tuple[str, ...] = ("/v1/tasks",)
    headers: tuple[str, ...] = ()
    body: str = ""
    connections: int = 64
    seconds: float = 5.0
    rate: float | None = None

    def requests(self) -> list[bytes]:
        """The bytes of one request for each path."""
        lines = ["Host: bench", *self.headers]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body.encode())}"]
        rest = "\r\n".join(lines) + "\r\n\r\n" + self.body
        return [f"{self.method} {path} HTTP/1.1\r\n{rest}".encode() for path in self.paths]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a load.

    Attributes:
        count: Requests that were answered with 2xx.
        refused: Requests that were answered otherwise; `refusal` is the first such answer.
        seconds: From the first due time to the last answer.
        cpu_seconds: Of the generator.
        latency: Percentiles in milliseconds, each counted from when the request was due: that it could not be sent
            because the server had not answered the one before is the server's delay, and is in them.
    """

    count: int
    refused: int
    refusal: str
    seconds: float
    cpu_seconds: float
    latency: dict[str, float]

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    def demand_success(self) -> Outcome:
        """Itself, if every request was answered with 2xx.

        Raises:
            RuntimeError: One was not; the message is the answer.
        """
        if self.refused or not self.count:
            raise RuntimeError(f"{self.refused} of {self.count + self.refused} requests were refused: {self.refusal}")
        return self


class _Caller(asyncio.Protocol):
    """One connection, with one request on it at a time."""

    def __init__(
        self, requests: Iterator[bytes], answered: Callable[[_Caller, bytes], None], lost: Callable[[_Caller], None]
    ) -> None:
        self._requests = requests
        self._answered = answered
        self._lost = lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._lost(self)

    def send(self, due: float, epoch: float) -> None:
        """Send the request that was due then.

        Args:
            due: On the monotonic clock.
            epoch: What to add for the seconds since 1970.
        """
        assert self._transport
        self.due = due
        self._transport.write(next(self._requests).replace(SENT_AT, b"%017.6f" % (due + epoch), 1))

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
        if len(self._received) < end + 4 + length:
            return
        answer = bytes(self._received)
        self._received.clear()
        self._answered(self, answer)

    def close(self) -> None:
        assert self._transport
        self._transport.close()


class _Run:
    """One load on its way."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._latencies = array("d")
        self._refused = 0
        self._refusal = ""
        self._waiting: deque[float] = deque()
        # The one that has been idle longest comes first: servers close connections that nobody uses.
        self._idle: deque[_Caller] = deque()
        self._requests = cycle(load.requests())
        self._connecting: set[asyncio.Task[None]] = set()
        self._finished = asyncio.Event()
        self._begun = 0.0
        self._ended = 0.0
        self._open = 0
        self._next = 0
        self._total = round(load.rate * load.seconds) if load.rate else 0
        self._epoch = time.time() - time.monotonic()

    async def __call__(self) -> Outcome:
        callers = [await self._connect() for _ in range(self._load.connections)]
        used = _cpu_seconds()
        self._begun = self._ended = time.monotonic()
        if self._load.rate:
            self._idle += callers
            self._tick()
        else:
            self._open = len(callers)
            for caller in callers:
                caller.send(self._begun, self._epoch)
        async with asyncio.timeout(self._load.seconds + PATIENCE_SECONDS):
            await self._finished.wait()
        used = _cpu_seconds() - used
        for caller in {*callers, *self._idle}:
            caller.close()
        return Outcome(
            count=len(self._latencies),
            refused=self._refused,
            refusal=self._refusal,
            seconds=self._ended - self._begun,
            cpu_seconds=used,
            latency=latencies(self._latencies),
        )

    def _tick(self) -> None:
        """Send what is due, and come back when the next request is."""
        assert self._load.rate
        now = time.monotonic()
        while self._next < self._total and (due := self._begun + self._next / self._load.rate) <= now:
            self._next += 1
            if self._idle:
                self._open += 1
                self._idle.popleft().send(due, self._epoch)
            else:
                self._waiting.append(due)
        if self._next < self._total:
            asyncio.get_running_loop().call_later(self._begun + self._next / self._load.rate - now, self._tick)

    def _answered(self, caller: _Caller, answer: bytes) -> None:
        now = self._ended = time.monotonic()
        if answer.startswith(b"HTTP/1.1 2"):
            self._latencies.append(now - caller.due)
        else:
            self._refused += 1
            self._refusal = self._refusal or answer[:2000].decode(errors="replace")
        if not self._load.rate and now < self._begun + self._load.seconds:
            caller.send(now, self._epoch)
        else:
            self._open -= 1
            self._free(caller)

    def _free(self, caller: _Caller) -> None:
        """Have a connection send what waits, if anything does."""
        if self._waiting:
            self._open += 1
            caller.send(self._waiting.popleft(), self._epoch)
            return
        self._idle.append(caller)
        if self._open == 0 and self._next == self._total:
            self._finished.set()

    def _lost(self, caller: _Caller) -> None:
        if self._finished.is_set():
            return
        if caller in self._idle:
            # Servers may do that, and callers connect again.
            self._idle.remove(caller)
            connecting = asyncio.get_running_loop().create_task(self._reconnect())
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)
            return
        self._refused += 1
        self._refusal = self._refusal or "the server closed a connection"
        self._finished.set()

    async def _connect(self) -> _Caller:
        _, caller = await asyncio.get_running_loop().create_connection(
            lambda: _Caller(self._requests, self._answered, self._lost), "127.0.0.1", self._load.port
        )
        return caller

    async def _reconnect(self) -> None:
        self._free(await self._connect())


async def apply(load: Load) -> Outcome:
    """Send a load from this process."""
    return await _Run(load)()


def apply_apart(load: Load) -> Outcome:
    """Send a load from a process of its own, and return when it has ended.

    Raises:
        RuntimeError: Not every request was answered with 2xx.
    """
    words = [sys.executable, "-m", "meshbench.load"]
    done = subprocess.run(words, input=json.dumps(asdict(load)), stdout=subprocess.PIPE, text=True, check=True)
    return Outcome(**json.loads(done.stdout)).demand_success()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    told = json.load(sys.stdin)
    sys.stdout.write(json.dumps(asdict(uvloop.run(apply(Load(**told))))))
