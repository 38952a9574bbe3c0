"""A gateway made of a script: a real HTTP server that gives the answers a test lays out, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

TASK_ID = "01980000-0000-7000-8000-000000000001"
CHILD_ID = "01980000-0000-7000-8000-000000000002"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer in full."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Hangup:
    """No answer at all: the connection is closed once the request was read."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Server-Sent Events, which end properly or are cut off."""

    pieces: Sequence[bytes]
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Under lower-case names."""
    body: Any


class ScriptedGateway:
    """Gives one answer after the other, whatever is asked; the last one again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self._script: list[Reply | Hangup | Stream] = []

    task_id = TASK_ID
    child_id = CHILD_ID

    def will(self, *script: Reply | Hangup | Stream) -> None:
        """Lay out the answers."""
        self._script = list(script)

    @staticmethod
    def reply(status: int = 200, body: Any = None, **headers: str) -> Reply:
        """Any answer; `Retry_After="1"` is the header Retry-After."""
        return Reply(status=status, body=body, headers={name.replace("_", "-"): text for name, text in headers.items()})

    @staticmethod
    def task_json(state: str = "queued", **fields: Any) -> dict[str, Any]:
        """A task as the gateway shows it."""
        return {
            "id": TASK_ID,
            "type": "billing.invoice.issue",
            "kind": "command",
            "state": state,
            "attempt": 0,
            "service": "billing",
            "payload": {},
            "result": None,
            "error": None,
            "priority": None,
            "tags": [],
            "parent_id": None,
            "root_id": TASK_ID,
            "schedule_id": None,
            "created_at": "2026-11-22T10:00:00Z",
            "updated_at": "2026-11-22T10:00:01Z",
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            **fields,
        }

    def task(self, state: str = "queued", *, status: int = 200, **fields: Any) -> Reply:
        """An answer with one task."""
        return Reply(status=status, body=self.task_json(state, **fields))

    @staticmethod
    def problem(
        status: int, code: str, *, errors: list[Any] | None = None, retry_after: str = "", **more: Any
    ) -> Reply:
        """A problem document as the gateway writes them."""
        document = {
            "type": f"/problems/{code}",
            "title": "It did not work",
            "status": status,
            "detail": "what is wrong, and where",
            "code": code,
            "instance": "/v1/tasks",
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            **({"errors": errors} if errors else {}),
            **more,
        }
        headers = {"Content-Type": "application/problem+json", **({"Retry-After": retry_after} if retry_after else {})}
        return Reply(status=status, body=document, headers=headers)

    @staticmethod
    def hangup() -> Hangup:
        """No answer at all."""
        return Hangup()

    @staticmethod
    def stream(*changes: tuple[int, str] | tuple[int, str, str], cut: bool = False) -> Stream:
        """Changes of state, each `(seq, state)` or `(seq, state, task id)`, with keep-alives between them."""
        return Stream(pieces=[b": keep-alive\n\n", *(_event(*change) for change in changes)], cut=cut)

    @staticmethod
    def raw_stream(*pieces: bytes, cut: bool = False) -> Stream:
        """The very bytes of a stream."""
        return Stream(pieces=pieces, cut=cut)

    def take(self, asked: Asked) -> Reply | Hangup | Stream:
        self.asked.append(asked)
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]


def _event(seq: int, state: str, task_id: str = TASK_ID) -> bytes:
    change = {
        "seq": seq,
        "task_id": task_id,
        "state": state,
        "attempt": 1,
        "at": "2026-11-22T10:00:00Z",
        "detail": None,
    }
    return f"id: {seq}\nevent: state\ndata: {json.dumps(change)}\n\n".encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gateway: ScriptedGateway

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = self.gateway.take(
            Asked(
                method=self.command,
                path=address.path,
                query=dict(parse_qsl(address.query)),
                headers={name.lower(): value for name, value in self.headers.items()},
                body=json.loads(content) if content else None,
            )
        )
        match answer:
            case Hangup():
                self.close_connection = True
            case Reply():
                self._reply(answer)
            case Stream():
                self._stream(answer)

    do_GET = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815 - the names http.server looks for

    def _reply(self, reply: Reply) -> None:
        content = b"" if reply.body is None else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            **reply.headers,
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, stream: Stream) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in stream.pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if not stream.cut:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing: the tests read `asked`."""


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    """A scripted gateway on a port of its own."""
    scripted = ScriptedGateway()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"gateway": scripted}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    scripted.url = f"http://127.0.0.1:{server.server_port}"
    yield scripted
    server.shutdown()
    thread.join()
    server.server_close()
