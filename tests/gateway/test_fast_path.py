"""The fast path of `POST /v1/tasks` answers as the route does, which it spares."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest
from starlette.types import Message

from gateway import tracing
from gateway.fast_path import FastPath
from gateway.new_tasks import NewTask
from gateway.schemas import TaskBatch, TaskView
from gateway.scopes import Scope

PLAIN = {"type": "greeter.person.greet", "payload": {"name": "Ada"}}
HANDED_ON = ("Prefer", "handling=lenient")
"""A preference that changes nothing, and that the fast path leaves to the route."""

Headers = list[tuple[str, str]]
Change = Callable[[Headers, bytes], tuple[Headers, bytes]]


def with_body(body: bytes | dict[str, Any]) -> Change:
    return lambda headers, _: (headers, body if isinstance(body, bytes) else json.dumps(body).encode())


def with_header(name: str, *values: str) -> Change:
    def change(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        return [each for each in headers if each[0] != name] + [(name, value) for value in values], body

    return change


def padded(headers: Headers, form: str) -> Headers:
    """With the key in another form."""
    return [
        (name, form.format(value.removeprefix("Bearer ")) if name == "Authorization" else value)
        for name, value in headers
    ]


REQUESTS = {
    "plain": with_body(PLAIN),
    "every field": with_body(
        PLAIN | {"priority": 3, "tags": ["ä"], "delay_seconds": 60, "expires_at": "2999-01-01T00:00:00+02:00"}
    ),
    "no JSON": with_body(b'{"type":'),
    "nothing": with_body(b""),
    "null": with_body(b"null"),
    "a list": with_body(b"[]"),
    "NaN": with_body(b'{"type": "greeter.person.greet", "payload": {"name": NaN}}'),
    "a lone surrogate": with_body(b'{"type": "greeter.person.greet", "payload": {"name": "\\ud800"}}'),
    "a byte order mark": with_body(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()),
    "a field missing": with_body({"type": PLAIN["type"]}),
    "a field too many": with_body(PLAIN | {"colour": "red"}),
    "two due times": with_body(PLAIN | {"run_at": "2999-01-01T00:00:00Z", "delay_seconds": 1}),
    "an unknown type": with_body(PLAIN | {"type": "greeter.person.greets"}),
    "another contract": with_body(PLAIN | {"payload": {"name": "", "times": 0}}),
    "a payload too large": with_body(PLAIN | {"payload": {"name": "x" * 200_000}}),
    "no key": with_header("Authorization"),
    "a wrong key": with_header("Authorization", "Bearer tm_0_0"),
    "a key after two blanks": lambda headers, body: (padded(headers, "Bearer  {}"), body),
    "a scheme in small letters": with_header("Authorization", "bearer nonsense"),
    "another scheme": with_header("Authorization", "Basic eDp5"),
    "a charset": with_header("Content-Type", "application/json; charset=utf-8"),
    "a relative of JSON": with_header("Content-Type", "application/cloudevents+json"),
    "another media type": with_header("Content-Type", "text/plain"),
    "no media type": with_header("Content-Type"),
    "an empty idempotency key": with_header("Idempotency-Key", ""),
    "an idempotency key too long": with_header("Idempotency-Key", "k" * 201),
    "two idempotency keys": with_header("Idempotency-Key", "one", "another"),
}


def shown(response: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """What is alike in the answers to two requests that are: all but their ids and times."""
    own = {"id", "root_id", "trace_id", "created_at", "due_at", "updated_at", "queued_at"}
    content = response.json()
    headers = {
        name: value
        for name, value in response.headers.items()
        if name not in {"location", "taskmesh-trace-id", "content-length", "date", "idempotent-replayed"}
    }
    return response.status_code, headers, {name: value for name, value in content.items() if name not in own}


async def send(api, change: Change, *more: tuple[str, str]) -> httpx.Response:
    headers, body = change(
        [("Authorization", f"Bearer {api.key}"), ("Content-Type", "application/json")], json.dumps(PLAIN).encode()
    )
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as caller:
        return await caller.post("/v1/tasks", content=body, headers=[*headers, *more])


@pytest.mark.parametrize("change", REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_request_is_answered_as_by_the_route(api, change):
    """Status, headers and body are those that the same request gets which only the route understands."""
    await api.announce()

    fast, routed = await send(api, change), await send(api, change, HANDED_ON)

    assert shown(fast) == shown(routed)


async def test_a_key_without_the_scope_is_refused_as_by_the_route(api):
    change = with_header("Authorization", f"Bearer {await api.new_key(Scope.TASKS_READ)}")

    fast, routed = await send(api, change), await send(api, change, HANDED_ON)

    assert fast.status_code == 403
    assert shown(fast) == shown(routed)


async def test_the_fast_path_and_the_route_know_each_others_idempotency_keys(api):
    """What one of them has accepted is answered again by the other."""
    await api.announce()
    change = with_header("Idempotency-Key", "invoice-1")

    first, again, third = await send(api, change), await send(api, change, HANDED_ON), await send(api, change)

    assert first.json() == again.json() == third.json()
    assert [each.headers.get("idempotent-replayed") for each in (first, again, third)] == [None, "true", "true"]
    assert first.headers["location"] == again.headers["location"] == third.headers["location"]


async def test_a_plain_submission_does_not_reach_the_route(api, monkeypatch):
    """The fast path answers by itself: if it handed everything on, nobody would notice but the benchmark."""
    await api.announce()
    handed_on = []
    whole = FastPath.__call__

    async def watched(self, scope, receive, send):
        inner = self._app

        async def noted(*arguments):
            handed_on.append(scope["path"])
            await inner(*arguments)

        monkeypatch.setattr(self, "_app", noted)
        await whole(self, scope, receive, send)
        monkeypatch.setattr(self, "_app", inner)

    monkeypatch.setattr(FastPath, "__call__", watched)

    assert (await send(api, REQUESTS["plain"])).status_code == 202
    assert (await send(api, with_header("Idempotency-Key", "k"))).status_code == 202
    assert handed_on == []
    assert (await send(api, REQUESTS["plain"], HANDED_ON)).status_code == 202
    assert handed_on == ["/v1/tasks"]


@pytest.mark.parametrize("more", [[], [HANDED_ON]], ids=["fast", "routed"])
async def test_a_request_that_fails_in_an_unforeseen_way_has_the_name_of_its_route(api, monkeypatch, more):
    """In the metric, the span and the span's name: it is the busiest route of all."""
    ended = []
    monkeypatch.setattr(tracing, "_end", lambda _, scope, status, *__: ended.append((scope["route"].path, status)))

    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api.app.state.gateway.submissions, "submit", fail)

    assert (await send(api, REQUESTS["plain"], *more)).status_code == 500
    assert ended == [("/v1/tasks", 500)]


async def test_a_body_that_grows_too_large_is_refused_as_by_the_route(api):
    """Its first piece may be more than the limit, without a length that tells so."""
    pieces = [{"type": "http.request", "body": b"x" * 200_000, "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return pieces.pop(0)

    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {api.key}".encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/tasks",
        "raw_path": b"/v1/tasks",
        "query_string": b"",
        "root_path": "",
        "headers": [*headers, (b"transfer-encoding", b"chunked")],
    }

    await api.app(scope, receive, keep)

    assert sent[0]["status"] == 413


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"due_at": datetime(2999, 1, 1, 1, 2, 3, 456000, tzinfo=UTC), "tags": ["ä"], "priority": 0},
        {
            "expires_at": datetime(2999, 1, 1, tzinfo=UTC),
            "api_key_id": uuid4(),
            "root_id": uuid4(),
            "parent_id": uuid4(),
        },
    ],
)
def test_a_new_task_is_shown_as_it_will_be_read(fields):
    """Byte for byte what its view says, though nothing reads it again before it is written."""
    payload = {
        "text": 'é"\u2028\x7f',
        "numbers": [1e16, -0.0, 2**70, 0.1],
        "nothing": None,
        "yes": True,
        "deep": {"": []},
    }
    row = NewTask(type="greeter.person.greet", service="greeter", payload=payload, **fields).row()

    assert TaskView.json_of(row) == TaskView.of(row).model_dump_json().encode()
    batch = TaskBatch(items=[TaskView.of(row), TaskView.of(row)])
    assert TaskBatch.json_of([row, row]) == batch.model_dump_json().encode()
