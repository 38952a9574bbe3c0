"""Headers that keep browsers and proxies from making more of an answer than it is."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SafeHeaders:
    """ASGI middleware: nothing is stored on the way unless its route says so, and nothing is run that is only shown."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ())]
                told = {name for name, _ in headers}
                if b"x-content-type-options" not in told:
                    headers.append((b"x-content-type-options", b"nosniff"))
                # Static files have an ETag; all else is of this moment, and most of it for one caller.
                if b"etag" not in told and b"cache-control" not in told:
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, completed)
