"""The fast path of `POST /v1/tasks` answers as the route does, which it spares."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway.fast_path import FastPath
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
