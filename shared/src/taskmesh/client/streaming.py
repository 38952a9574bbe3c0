"""Server-Sent Events: the changes of state of a task, as they happen, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import quote
from uuid import UUID

import httpx

from taskmesh.client.exchange import (
    Close,
    Deadline,
    Emit,
    Lost,
    Open,
    Opened,
    Operation,
    Patience,
    Pause,
    Read,
    Request,
    pause_or_raise,
    trace_headers,
    with_read_limit,
)
from taskmesh.client.results import StateChange

# The gateway writes a comment every 15 s; three missing ones are a lost connection.
LONGEST_SILENCE_SECONDS = 45.0


@dataclass(frozen=True, kw_only=True)
class ServerSentEvent:
    """One event of a stream."""

    event: str
    data: str
    id: str


class EventParser:
    """Turns the bytes of a stream into events, whatever pieces they come in.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    An event that the stream's end cuts short is dropped, as the specification asks.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        """The events that these bytes complete."""
        # A line ends with \n or \r\n; the lone \r that the specification allows too is not what the gateway writes.
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r").decode())

    def _line(self, line: str) -> Iterator[ServerSentEvent]:
        if not line:
            if self._data:
                yield ServerSentEvent(event=self._event or "message", data="\n".join(self._data), id=self._id)
            self._event, self._data = "", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id":
                self._id = value
            case _:  # A comment, which has no name, or a field of a later version.
                pass


def follow(task_id: UUID | str, *, tree: bool, after: int | None, patience: Patience) -> Operation[None]:
    """Emit each change of state once, until the task, or with `tree` every task of its tree, is finished.

    A lost connection is opened again behind the last change that came. Only the gateway knows when a tree is finished:
    it ends the stream, and answers 204 to whoever comes back.

    Raises:
        TaskmeshProblem: The gateway refused the stream.
        GatewayUnreachable: The connection was lost and did not come back within the time allowed.
    """
    request = Request(
        method="GET",
        path=f"/v1/tasks/{quote(str(task_id), safe='')}/events",
        query=(("tree", "true"),) if tree else (),
        headers={**trace_headers(), "Accept": "text/event-stream"},
        repeatable=True,
        hold_seconds=LONGEST_SILENCE_SECONDS - patience.read_seconds,
    )
    progress = _Progress(after)
    deadline = Deadline(patience.total_seconds)
    tries = 0
    while True:
        tries += 1
        opening = replace(request, headers={**request.headers, **progress.headers})
        outcome = yield Open(with_read_limit(opening, patience, Deadline(LONGEST_SILENCE_SECONDS)))
        if isinstance(outcome, Opened):
            before = progress.last_id
            lost = yield from _read(outcome, progress)
            if outcome.status == httpx.codes.NO_CONTENT or (lost is None and progress.complete and not tree):
                return
            # The time allowed is for finding the gateway again, so it starts anew whenever it was found.
            deadline = Deadline(patience.total_seconds)
            if progress.last_id != before:
                tries = 1
            if lost is None:
                # A proper end, but perhaps only because the gateway is restarting.
                yield Pause(patience.pause(tries))
                continue
            outcome = lost
        yield from pause_or_raise(outcome, request, deadline, patience, tries)


class _Progress:
    """How far the stream has come."""

    def __init__(self, after: int | None) -> None:
        self.last_id = None if after is None else str(after)
        self.complete = False
        """Whether the last change was to a state that no task leaves."""

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.last_id is None else {"Last-Event-ID": self.last_id}

    def note(self, event_id: str, change: StateChange) -> None:
        if event_id:
            self.last_id = event_id
        self.complete = change.state.terminal


def _read(stream: Opened, progress: _Progress) -> Operation[Lost | None]:
    """Emit what one connection brings; None when it ended properly."""
    parser = EventParser()
    while True:
        piece = yield Read(stream)
        if isinstance(piece, Lost) or not piece:
            yield Close(stream)
            return piece if isinstance(piece, Lost) else None
        for event in parser.feed(piece):
            if event.event != "state":
                continue
            change = StateChange.model_validate_json(event.data)
            progress.note(event.id, change)
            yield Emit(change)
