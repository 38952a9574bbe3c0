"""Following a task as Server-Sent Events."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from gateway import ledger, waiting
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState


def happened(task_id: str | UUID, state: TaskState, **fields: Any) -> LifecycleEvent:
    values = {"at": datetime.now(UTC), "service": "greeter", "type": "greeter.person.greet"} | fields
    return LifecycleEvent(task_id=UUID(str(task_id)), state=state, **values)


async def advance(api, *events: LifecycleEvent) -> None:
    async with api.engine.begin() as connection:
        await ledger.advance(connection, events)


class Stream:
    """What a follower has received."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, Any] | None:
        """The next event; None at the end of the stream."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            if not line and "data" in fields:
                event = json.loads(fields["data"])
                assert fields["event"] == "state"
                assert fields["id"] == str(event["seq"])
                return event
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        return None

    async def rest(self) -> list[str]:
        """The states until the end."""
        states = []
        while (event := await self.next()) is not None:
            states.append(event["state"])
        return states


@asynccontextmanager
async def follow(api, task_id: str, *, after: int | None = None, **query: Any):
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    async with api.http.stream("GET", f"/v1/tasks/{task_id}/events", headers=headers, params=query) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


async def test_a_follower_sees_each_step_as_it_happens_and_the_stream_ends_with_the_task(api):
    view = await api.submit()

    async with follow(api, view["id"]) as stream:
        first = await stream.next()
        await advance(api, happened(view["id"], TaskState.RUNNING, worker="host:1"))
        second = await stream.next()
        await advance(api, happened(view["id"], TaskState.SUCCEEDED))
        rest = await stream.rest()

    assert (first["state"], first["attempt"], first["task_id"]) == ("queued", 0, view["id"])
    assert first["at"].endswith("Z")
    assert (second["state"], second["attempt"], second["detail"]) == ("running", 1, {"worker": "host:1"})
    assert rest == ["succeeded"]


async def test_who_comes_back_gets_what_came_after_the_last_event_seen(api):
    view = await api.submit()
    await advance(api, happened(view["id"], TaskState.RUNNING), happened(view["id"], TaskState.SUCCEEDED))
    async with follow(api, view["id"]) as stream:
        seen = await stream.next()

    async with follow(api, view["id"], after=seen["seq"]) as stream:
        assert await stream.rest() == ["running", "succeeded"]


async def test_who_has_seen_everything_is_told_not_to_come_back(api):
    view = await api.submit()
    await advance(api, happened(view["id"], TaskState.SUCCEEDED))
    last = 0
    async with follow(api, view["id"]) as stream:
        while (event := await stream.next()) is not None:
            last = event["seq"]

    response = await api.http.get(f"/v1/tasks/{view['id']}/events", headers={"Last-Event-ID": str(last)})

    assert response.status_code == 204


async def test_a_tree_is_followed_until_all_of_it_is_finished(api):
    view = await api.submit()
    root, child = UUID(view["id"]), uuid4()

    async with follow(api, view["id"], tree=True) as stream:
        await stream.next()
        await advance(
            api,
            happened(root, TaskState.SUCCEEDED, root_id=root),
            happened(child, TaskState.RUNNING, root_id=root, parent_id=root, service="email"),
        )
        seen = [await stream.next(), await stream.next()]
        await advance(api, happened(child, TaskState.SUCCEEDED, root_id=root, service="email"))
        rest = await stream.rest()

    assert {(event["task_id"], event["state"]) for event in seen} == {(str(root), "succeeded"), (str(child), "running")}
    assert rest == ["succeeded"]


async def test_streams_end_when_the_process_stops(api):
    view = await api.submit()

    async with follow(api, view["id"]) as stream:
        await stream.next()
        api.app.state.gateway.doorbell.stop()

        assert await stream.rest() == []


async def test_a_follower_who_is_never_notified_sees_everything_a_little_later(api, monkeypatch):
    """The LISTEN connection is cut, and may not come back: the slow poll finds what happened."""
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.2)
    api.app.state.gateway.doorbell._ring = lambda _: None
    view = await api.submit()

    async with follow(api, view["id"]) as stream:
        await stream.next()
        await advance(api, happened(view["id"], TaskState.SUCCEEDED))

        assert await stream.rest() == ["succeeded"]


async def test_the_doorbell_listens_again_after_its_connection_was_cut(api, gateway_url):
    view = await api.submit()
    waiting_task = asyncio.create_task(api.http.get(f"/v1/tasks/{view['id']}", headers={"Prefer": "wait=30"}))
    async with await psycopg.AsyncConnection.connect(gateway_url, autocommit=True) as admin:
        doorbell = "from pg_stat_activity where application_name = 'gateway-doorbell' and datname = current_database()"
        cut = await (await admin.execute(f"select pid, pg_terminate_backend(pid) {doorbell}")).fetchall()
        while True:
            back = await (await admin.execute(f"select pid {doorbell}")).fetchall()
            if back and back[0][0] != cut[0][0]:
                break

    await advance(api, happened(view["id"], TaskState.SUCCEEDED))

    assert (await waiting_task).json()["state"] == "succeeded"


@pytest.mark.parametrize("value", ["abc", "-1"])
async def test_an_event_id_that_is_none_is_a_problem(api, value):
    view = await api.submit()

    response = await api.http.get(f"/v1/tasks/{view['id']}/events", headers={"Last-Event-ID": value})

    assert response.status_code == 422


async def test_nobody_is_kept_as_a_subscriber_after_the_end(api):
    view = await api.submit()
    await advance(api, happened(view["id"], TaskState.SUCCEEDED))

    async with follow(api, view["id"]) as stream:
        await stream.rest()

    assert api.app.state.gateway.doorbell._waiting == {}
