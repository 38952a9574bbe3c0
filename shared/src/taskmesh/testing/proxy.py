"""A TCP proxy that fails on command: the network between a client and a real server, in the hands of a test."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
import struct
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class TcpProxy:
    """Forwards connections to a server until told to stall, slow, cut or refuse them; an async context manager.

    Args:
        url: Of the server; `url` of the proxy is the same with the proxy's own port.
        tls: With it clients talk TLS to the proxy, which talks plainly to the server.
    """

    def __init__(self, url: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._parts = urlsplit(url)
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._requests, self._answers = asyncio.Event(), asyncio.Event()
        self.resume()
        self._delay_seconds = 0.0
        self._bytes_per_second = math.inf
        self._port = 0
        self.accepted = 0
        """Connections that were made so far."""

    @property
    def url(self) -> str:
        """The server's URL by way of the proxy."""
        credentials, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{credentials}{at}127.0.0.1:{self._port}"))

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.refuse()

    async def accept(self) -> None:
        """Take connections (again), on the same port as before."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
            self._port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Cut what is open and refuse new connections, like a server that is down."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> int:
        """Reset every open connection, and return how many there were."""
        for pump in self._pumps:
            pump.cancel()
        for client in self._clients:
            _reset(client)
        return len(self._clients)

    def stall(self) -> None:
        """Hold back the server's answers; what clients send still arrives."""
        self._answers.clear()

    def swallow(self) -> int:
        """Hold back everything in both directions, and new connections too; return how many there are already."""
        self._requests.clear()
        self._answers.clear()
        return len(self._clients)

    def resume(self) -> None:
        """Let everything through, what was held back first."""
        self._requests.set()
        self._answers.set()

    def slow_down(self, delay_seconds: float, bytes_per_second: float) -> int:
        """Make every packet late, and the line narrow; return how many connections there are."""
        self._delay_seconds, self._bytes_per_second = delay_seconds, bytes_per_second
        return len(self._clients)

    def speed_up(self) -> None:
        """Be as fast as can be again."""
        self.slow_down(0.0, math.inf)

    def inject(self, data: bytes) -> None:
        """Send bytes to every client as if the server had."""
        for client in self._clients:
            client.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._clients.add(writer)
        pumps: set[asyncio.Task[None]] = {asyncio.create_task(self._connect(reader, writer))}
        self._pumps |= pumps
        try:
            await asyncio.wait(pumps)
        finally:
            self._pumps -= pumps
            self._clients.discard(writer)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until one of its ends, or the proxy, gives it up."""
        await self._requests.wait()
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        except OSError:
            # The server is down, and its client is to learn it at once.
            _reset(writer)
            return
        pumps = {
            asyncio.create_task(self._pump(reader, upstream_writer, self._requests)),
            asyncio.create_task(self._pump(upstream_reader, writer, self._answers)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            upstream_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await gate.wait()
                if self._delay_seconds:
                    await asyncio.sleep(self._delay_seconds + len(data) / self._bytes_per_second)
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection as a crashed host would: without the lingering, the kernel says goodbye politely."""
    connection = writer.get_extra_info("socket")
    # It may be closed already, and not yet forgotten.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
