"""A wire between processes and a server, which a test can stall or cut."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

from taskmesh.testing.proxy import TcpProxy


class Wire:
    """A proxy on a thread of its own, for tests whose processes are elsewhere."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._proxy = TcpProxy(url)
        self.run(self._proxy.accept)

    @property
    def url(self) -> str:
        return self._proxy.url

    def run(self, act: Callable[[], Any]) -> None:
        """Have one of the proxy's methods called, and wait for its end."""

        async def call() -> None:
            result = act()
            if inspect.isawaitable(result):
                await result

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout=10)

    def refuse(self) -> None:
        """Reset every connection, and take no new one until `accept`."""
        self.run(self._proxy.refuse)

    def accept(self) -> None:
        """Take connections again."""
        self.run(self._proxy.accept)

    def stall(self) -> None:
        """Hold back the server's answers."""
        self.run(self._proxy.stall)

    def cut(self) -> None:
        """Reset every connection; what was held back is lost."""
        self.run(self._proxy.cut)
        self.run(self._proxy.resume)

    def close(self) -> None:
        self.run(self._proxy.refuse)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
