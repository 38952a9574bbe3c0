"""The network between the roles and their two servers, in the campaign's hands."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from taskmesh.testing.proxy import TcpProxy
from taskmesh_local.faults.schedule import BROKER, DATABASE

SLOW_DELAY_SECONDS = 0.05
SLOW_BYTES_PER_SECOND = 200_000.0


class Proxies:
    """One proxy in front of each server; use it as an async context manager."""

    def __init__(self, *, database_url: str, broker_url: str) -> None:
        self._stack = AsyncExitStack()
        self.of: Mapping[str, TcpProxy] = {DATABASE: TcpProxy(database_url), BROKER: TcpProxy(broker_url)}
        self._servers = {_address(database_url): DATABASE, _address(broker_url): BROKER}

    async def __aenter__(self) -> Self:
        for proxy in self.of.values():
            await self._stack.enter_async_context(proxy)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def detour(self, url: str) -> str:
        """The URL with its server's proxy in the server's place; any other URL as it is."""
        server = self._servers.get(_address(url))
        if server is None:
            return url
        parts = urlsplit(url)
        credentials, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}{_address(self.of[server].url)}"))

    def heal(self) -> None:
        """Let everything through at full speed."""
        for proxy in self.of.values():
            proxy.speed_up()
            proxy.resume()


def _address(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}"
