"""The load generator, against real HTTP servers that behave as a test wants it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise

import pytest

from meshbench.load import SENT_AT, Load, apply

ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 9\r\n\r\nnot today"
STALL_SECONDS = 0.3

Answer = Callable[[bytes], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[int]:
    """An HTTP server; yields its port."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                writer.write(await answer(head + body))
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def stalling_once() -> Answer:
    """Answers at once, but for the first request, which takes 0.3 s."""
    delays = iter([STALL_SECONDS])

    async def answer(_: bytes) -> bytes:
        if delay := next(delays, None):
            # This is the server that is slow, no wait of the test's.
            await asyncio.sleep(delay)
        return ACCEPTED

    return answer


async def accepting(_: bytes) -> bytes:
    return ACCEPTED


async def test_a_stall_is_in_the_latency_of_every_request_that_was_due_meanwhile():
    """100 requests a second for half a second; 30 of the 50 become due while the server does not answer."""
    async with serving(stalling_once()) as port:
        outcome = await apply(Load(port=port, connections=1, rate=100, seconds=0.5))

    assert outcome.latency["p50"] > 1000 * STALL_SECONDS / 10


async def test_a_closed_loop_sees_a_stall_once():
    """Which is why its latency is shown beside the greatest rate only."""
    async with serving(stalling_once()) as port:
        outcome = await apply(Load(port=port, connections=1, seconds=0.5))

    assert outcome.latency["p50"] < 1000 * STALL_SECONDS / 10 < outcome.latency["max"]


async def test_every_request_that_is_due_is_sent_although_the_server_is_late():
    async with serving(stalling_once()) as port:
        outcome = await apply(Load(port=port, connections=2, rate=200, seconds=0.4))

    assert outcome.count == 80


async def test_a_request_says_when_it_was_due():
    seen = []

    async def answer(request: bytes) -> bytes:
        seen.append(float(request.rpartition(b"\r\n")[2]))
        return ACCEPTED

    async with serving(answer) as port:
        await apply(Load(port=port, body=SENT_AT.decode(), connections=4, rate=100, seconds=0.1))

    gaps = [later - earlier for earlier, later in pairwise(seen)]
    assert gaps == pytest.approx([0.01] * 9, abs=1e-5)


async def test_paths_are_taken_in_turn():
    seen = []

    async def answer(request: bytes) -> bytes:
        seen.append(request.split()[1])
        return ACCEPTED

    async with serving(answer) as port:
        await apply(Load(port=port, method="GET", paths=("/a", "/b"), connections=1, rate=200, seconds=0.02))

    assert seen == [b"/a", b"/b", b"/a", b"/b"]


async def test_a_refused_request_is_no_success():
    async def answer(_: bytes) -> bytes:
        return REFUSED

    async with serving(answer) as port:
        outcome = await apply(Load(port=port, connections=1, rate=50, seconds=0.1))

    assert (outcome.count, outcome.refused) == (0, 5)
    with pytest.raises(RuntimeError, match="not today"):
        outcome.demand_success()


async def test_a_connection_that_the_server_closes_is_no_success():
    async def answer(_: bytes) -> bytes:
        raise ConnectionResetError

    async with serving(answer) as port:
        outcome = await apply(Load(port=port, connections=1, seconds=0.1))

    with pytest.raises(RuntimeError, match="closed a connection"):
        outcome.demand_success()


async def test_a_connection_that_is_closed_between_requests_is_made_again():
    """As servers do with those that nobody uses for a while; the next request does not notice."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ACCEPTED)
        writer.close()

    async with await asyncio.start_server(converse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await apply(Load(port=port, method="GET", connections=2, rate=50, seconds=0.1))

    assert (outcome.count, outcome.refused) == (5, 0)


async def test_an_answer_in_pieces_is_one_answer():
    """Each byte comes by itself."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                for byte in ACCEPTED:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(converse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await apply(Load(port=port, method="GET", connections=1, rate=50, seconds=0.1))

    assert outcome.count == 5
