"""The network that fails on command."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from taskmesh.parts.ports import free_port
from taskmesh.testing.proxy import TcpProxy


@contextlib.asynccontextmanager
async def echo():
    """A server that answers with what it was sent."""

    async def answer(reader, writer):
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def connect(proxy):
    return await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))


async def say(reader, writer, text=b"hello"):
    writer.write(text)
    return await asyncio.wait_for(reader.readexactly(len(text)), 5)


async def test_a_black_hole_holds_both_ways_and_then_lets_everything_through():
    """New connections too: they are made, and nothing is heard of them."""
    async with echo() as url, TcpProxy(url) as proxy:
        old = await connect(proxy)
        await say(*old)

        assert proxy.swallow() == 1
        new = await connect(proxy)
        answers = [asyncio.create_task(say(*ends)) for ends in (old, new)]
        done, _ = await asyncio.wait(answers, timeout=0.2)
        assert not done

        proxy.resume()
        assert await asyncio.gather(*answers) == [b"hello", b"hello"]


async def test_a_slow_link_is_late_in_both_directions():
    async with echo() as url, TcpProxy(url) as proxy:
        ends = await connect(proxy)
        proxy.slow_down(0.1, 1_000_000)
        begun = time.monotonic()
        await say(*ends)
        assert time.monotonic() - begun >= 0.2

        proxy.speed_up()
        begun = time.monotonic()
        await say(*ends)
        assert time.monotonic() - begun < 0.2


async def test_a_cut_resets_what_is_open():
    async with echo() as url, TcpProxy(url) as proxy:
        reader, writer = await connect(proxy)
        await say(reader, writer)

        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)
        writer.close()


async def test_a_server_that_is_down_is_down_behind_its_proxy_too():
    """The client learns it at once, in place of waiting for an answer."""
    async with TcpProxy(f"tcp://127.0.0.1:{free_port()}") as proxy:
        reader, writer = await connect(proxy)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(1), 5) == b""
        writer.close()


async def test_a_cut_passes_over_connections_that_are_just_closing():
    """One that is gone must not keep the others from being cut."""
    async with echo() as url, TcpProxy(url) as proxy:
        ends = [await connect(proxy) for _ in range(2)]
        for each in ends:
            await say(*each)
        next(iter(proxy._clients)).transport.get_extra_info("socket")._sock.close()

        assert proxy.cut() == 2
