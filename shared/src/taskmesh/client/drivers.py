"""The I/O of the client, twice: blocking and with async/await. Everything else is written once (exchange.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any, cast

import httpx

from taskmesh.client.exchange import Answer, Close, Emit, Lost, Open, Opened, Operation, Pause, Read, Request, ResultT

CONNECT_SECONDS = 5.0


class Driver:
    """Carries out operations with a blocking HTTP client, which it does not own."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def run(self, operation: Operation[ResultT]) -> ResultT:
        """The result of an operation that emits nothing."""
        outcome: Any = None
        try:
            while True:
                outcome = self._perform(operation.send(outcome))
        except StopIteration as end:
            return cast("ResultT", end.value)

    def iterate(self, operation: Operation[None]) -> Iterator[Any]:
        """What the operation emits, as it comes; a stream that is open when the caller stops is closed."""
        outcome: Any = None
        streams: set[Opened] = set()
        with closing(operation):
            try:
                while True:
                    step = operation.send(outcome)
                    if isinstance(step, Emit):
                        outcome = None
                        yield step.value
                        continue
                    outcome = self._perform(step)
                    _track(streams, step, outcome)
            except StopIteration:
                return
            finally:
                for stream in streams:
                    self._perform(Close(stream))

    def _perform(self, step: Any) -> Any:
        try:
            match step:
                case Request():
                    return _answer(self._http.send(_build(self._http, step)))
                case Pause(seconds):
                    time.sleep(seconds)
                case Open(request):
                    response = self._http.send(_build(self._http, request), stream=True)
                    if response.is_success:
                        return Opened((response, response.iter_bytes()), response.status_code)
                    with closing(response):
                        response.read()
                        return _answer(response)
                case Read(Opened(handle=(_, chunks))):
                    return next(chunks, b"")
                case Close(Opened(handle=(response, _))):
                    response.close()
        except httpx.HTTPError as error:
            return Lost(error)
        return None


class AsyncDriver:
    """Carries out operations with an async HTTP client, which it does not own."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def run(self, operation: Operation[ResultT]) -> ResultT:
        """The result of an operation that emits nothing."""
        outcome: Any = None
        try:
            while True:
                outcome = await self._perform(operation.send(outcome))
        except StopIteration as end:
            return cast("ResultT", end.value)

    async def iterate(self, operation: Operation[None]) -> AsyncIterator[Any]:
        """What the operation emits, as it comes; a stream that is open when the caller stops is closed."""
        outcome: Any = None
        streams: set[Opened] = set()
        with closing(operation):
            try:
                while True:
                    try:
                        step = operation.send(outcome)
                    except StopIteration:
                        return
                    if isinstance(step, Emit):
                        outcome = None
                        yield step.value
                        continue
                    outcome = await self._perform(step)
                    _track(streams, step, outcome)
            finally:
                for stream in streams:
                    await self._perform(Close(stream))

    async def _perform(self, step: Any) -> Any:
        try:
            match step:
                case Request():
                    return _answer(await self._http.send(_build(self._http, step)))
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                case Open(request):
                    response = await self._http.send(_build(self._http, request), stream=True)
                    if response.is_success:
                        return Opened((response, response.aiter_bytes()), response.status_code)
                    async with aclosing(response):
                        await response.aread()
                        return _answer(response)
                case Read(Opened(handle=(_, chunks))):
                    return await anext(chunks, b"")
                case Close(Opened(handle=(response, _))):
                    await response.aclose()
        except httpx.HTTPError as error:
            return Lost(error)
        return None


def _build(http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
    return http.build_request(
        request.method,
        request.path,
        params=list(request.query) or None,
        headers=dict(request.headers),
        json=request.body,
        timeout=httpx.Timeout(request.read_seconds, connect=min(CONNECT_SECONDS, request.read_seconds)),
    )


def _answer(response: httpx.Response) -> Answer:
    return Answer(status=response.status_code, headers=response.headers, body=response.content)


def _track(streams: set[Opened], step: Any, outcome: Any) -> None:
    if isinstance(outcome, Opened):
        streams.add(outcome)
    elif isinstance(step, Close):
        streams.discard(step.stream)
