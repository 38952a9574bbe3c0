"""`/v1/schedules` over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import auth, catalogue, models, schedules
from gateway.api import create_app
from gateway.routes.schedules import merge_patch
from gateway.scheduler import fire_due
from gateway.scopes import Scope
from gateway.settings import ApiSettings
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, ScheduleManifest, TypeManifest

TYPE = TypeManifest(
    type="billing.books.close",
    kind=TaskKind.COMMAND,
    queue="billing",
    version=3,
    payload_schema={
        "type": "object",
        "properties": {"year": {"type": "integer"}, "note": {"type": ["string", "null"]}},
        "required": ["year"],
        "additionalProperties": False,
    },
)
MANIFEST = Manifest(
    service="billing",
    release="1",
    types=(TYPE,),
    schedules=(ScheduleManifest(name="sweep", type=TYPE.type, payload={"year": 1}, interval_seconds=60),),
    announced_at=datetime(2026, 1, 1, tzinfo=UTC),
)
NIGHTLY = {
    "name": "nightly close",
    "type": "billing.books.close",
    "payload": {"year": 2026},
    "cron": "30 2 * * *",
    "timezone": "Europe/Berlin",
}


@pytest_asyncio.fixture
async def engine(gateway_engine: AsyncEngine) -> AsyncEngine:
    """A gateway's database in which billing has announced itself."""
    async with gateway_engine.begin() as connection:
        await catalogue.store(connection, MANIFEST)
        await schedules.sync_announced(connection, MANIFEST)
    return gateway_engine


@pytest_asyncio.fixture
async def client(engine: AsyncEngine, gateway_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A caller whose key may read and write schedules."""
    async with engine.begin() as connection:
        key = await auth.create_key(connection, "test", [Scope.SCHEDULES_READ, Scope.SCHEDULES_WRITE])
    settings = ApiSettings(
        database_url=gateway_url, amqp_url="amqp://unused", http_host="127.0.0.1", http_port=0, database_pool_size=5
    )
    app = create_app(settings)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway", headers={"Authorization": f"Bearer {key}"}
    ) as client:
        yield client
    await app.state.gateway.engine.dispose()


async def make(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    """Create a schedule and return it."""
    response = await client.post("/v1/schedules", json={**NIGHTLY, **changes})
    assert response.status_code == 201, response.text
    created: dict[str, Any] = response.json()
    return created


def pointers(response: httpx.Response) -> list[str]:
    """Return where a problem document points."""
    return [error["pointer"] for error in response.json().get("errors", [])]


async def test_a_schedule_is_made_and_read_again(client: httpx.AsyncClient) -> None:
    """It shows its next five fires; `Location` leads to it."""
    response = await client.post("/v1/schedules", json=NIGHTLY)

    assert response.status_code == 201
    schedule = response.json()
    assert response.headers["Location"] == f"/v1/schedules/{schedule['id']}"
    assert (await client.get(response.headers["Location"])).json() == schedule
    assert {name: schedule[name] for name in NIGHTLY} == NIGHTLY
    assert schedule["misfire"] == "once"
    assert schedule["overlap"] == "allow"
    assert (schedule["paused"], schedule["owner"], schedule["last_fire_at"]) == (False, None, None)
    assert len(schedule["next_fires"]) == 5
    assert schedule["next_fire_at"] == schedule["next_fires"][0]
    assert schedule["next_fire_at"].endswith("Z")


@pytest.mark.parametrize(
    ("changes", "status", "code", "where"),
    [
        ({"cron": "61 * * * *"}, 422, "invalid_request", ["/cron"]),
        ({"cron": "0 0 30 2 *"}, 422, "invalid_request", ["/cron"]),
        ({"cron": None}, 422, "invalid_request", ["/cron"]),
        ({"interval_seconds": 5}, 422, "invalid_request", ["/cron"]),
        ({"cron": None, "interval_seconds": 0.5}, 422, "invalid_request", ["/interval_seconds"]),
        ({"timezone": "Europe/Berln"}, 422, "invalid_request", ["/timezone"]),
        ({"ends_at": "2020-01-01T00:00:00Z"}, 422, "invalid_request", ["/ends_at"]),
        ({"starts_at": "2026-01-01T00:00:00"}, 422, "invalid_request", ["/starts_at"]),
        ({"starts_at": "9999-12-31T23:59:59-12:00"}, 422, "invalid_request", ["/starts_at"]),
        ({"misfire": "never"}, 422, "invalid_request", ["/misfire"]),
        ({"name": "billing/sweep"}, 422, "invalid_request", ["/name"]),
        ({"colour": "red"}, 422, "invalid_request", ["/colour"]),
        ({"payload": {"year": "x", "z": 1}}, 422, "contract_violation", ["/payload/year", "/payload/z"]),
        ({"type": "billing.books.clsoe"}, 404, "unknown_type", ["/type"]),
    ],
)
async def test_a_wrong_schedule_is_refused_and_the_field_named(
    client: httpx.AsyncClient, changes: dict[str, Any], status: int, code: str, where: list[str]
) -> None:
    """Nothing is stored."""
    response = await client.post("/v1/schedules", json={**NIGHTLY, **changes})

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert sorted(pointers(response)) == where
    listed = (await client.get("/v1/schedules")).json()["items"]
    assert [schedule["name"] for schedule in listed] == ["billing/sweep"]


async def test_a_name_is_taken_once(client: httpx.AsyncClient) -> None:
    """The second schedule of a name is a conflict."""
    await make(client)

    response = await client.post("/v1/schedules", json=NIGHTLY)

    assert (response.status_code, response.json()["code"]) == (409, "conflict")


async def test_a_repeated_request_makes_one_schedule(client: httpx.AsyncClient) -> None:
    """Twenty at once under one idempotency key get one answer; another body under the key is refused."""
    headers = {"Idempotency-Key": "abc"}
    together = await asyncio.gather(*(client.post("/v1/schedules", json=NIGHTLY, headers=headers) for _ in range(20)))
    other = await client.post("/v1/schedules", json={**NIGHTLY, "name": "other"}, headers=headers)

    assert {response.status_code for response in together} == {201}
    assert len({response.content for response in together}) == 1
    assert sum("Idempotent-Replayed" in response.headers for response in together) == 19
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


async def test_a_schedule_that_was_made_is_answered_again_though_its_type_has_gone_since(
    client: httpx.AsyncClient, engine: AsyncEngine
) -> None:
    """A repetition is not held against the catalogue of its own moment."""
    headers = {"Idempotency-Key": "abc"}
    first = await client.post("/v1/schedules", json=NIGHTLY, headers=headers)
    async with engine.begin() as connection:
        await connection.execute(models.manifests.delete())

    # `find_command` looks again before it calls a type unknown, and the cache of a second may hide that it has gone.
    async with asyncio.timeout(20):
        while (new := await client.post("/v1/schedules", json={**NIGHTLY, "name": "other"})).status_code != 404:
            await client.delete(new.headers["Location"])
    again = await client.post("/v1/schedules", json=NIGHTLY, headers=headers)

    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_a_merge_patch_changes_what_it_names(client: httpx.AsyncClient) -> None:
    """Null takes a field back to its default, and objects are merged."""
    schedule = await make(client, tags=["a"], payload={"year": 2026, "note": "x"})

    response = await client.patch(
        f"/v1/schedules/{schedule['id']}",
        json={"cron": None, "interval_seconds": 60, "tags": None, "payload": {"note": None}},
        headers={"Content-Type": "application/merge-patch+json"},
    )

    assert response.status_code == 200, response.text
    changed = response.json()
    assert (changed["cron"], changed["interval_seconds"], changed["tags"]) == (None, 60, [])
    assert changed["payload"] == {"year": 2026}
    assert changed["name"] == schedule["name"]
    steps = [datetime.fromisoformat(moment) for moment in changed["next_fires"]]
    assert {later - earlier for earlier, later in pairwise(steps)} == {timedelta(minutes=1)}


@pytest.mark.parametrize(
    ("patch", "status", "code", "where"),
    [
        ({"interval_seconds": 60}, 422, "invalid_request", ["/cron"]),
        ({"name": None}, 422, "invalid_request", ["/name"]),
        ({"priority": 10}, 422, "invalid_request", ["/priority"]),
        ({"id": "x"}, 422, "invalid_request", ["/id"]),
        ({"payload": {"year": "x"}}, 422, "contract_violation", ["/payload/year"]),
        ({"type": "nobody.knows.this"}, 404, "unknown_type", ["/type"]),
        ({"name": "other"}, 409, "conflict", []),
    ],
)
async def test_a_wrong_change_is_refused(
    client: httpx.AsyncClient, patch: dict[str, Any], status: int, code: str, where: list[str]
) -> None:
    """The schedule stays as it was."""
    await make(client, name="other")
    schedule = await make(client)
    address = f"/v1/schedules/{schedule['id']}"

    response = await client.patch(address, json=patch)

    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert pointers(response) == where
    assert (await client.get(address)).json() == schedule


async def test_pausing_and_resuming(client: httpx.AsyncClient) -> None:
    """A paused schedule has no next fire; resumed it has, and both may be said twice."""
    schedule = await make(client)
    address = f"/v1/schedules/{schedule['id']}"

    paused = [(await client.post(f"{address}:pause")).json() for _ in range(2)]
    resumed = [(await client.post(f"{address}:resume")).json() for _ in range(2)]

    assert paused[0] == paused[1]
    assert (paused[0]["paused"], paused[0]["next_fire_at"], paused[0]["next_fires"]) == (True, None, [])
    assert resumed[0] == resumed[1]
    assert resumed[0]["next_fires"] == schedule["next_fires"]


async def test_deleting(client: httpx.AsyncClient) -> None:
    """It is gone afterwards, and its name is free again."""
    schedule = await make(client)
    address = f"/v1/schedules/{schedule['id']}"

    first, second = await client.delete(address), await client.delete(address)

    assert (first.status_code, first.content) == (204, b"")
    assert (second.status_code, second.json()["code"]) == (404, "not_found")
    await make(client)


async def test_an_announced_schedule_may_be_paused_but_not_changed(client: httpx.AsyncClient) -> None:
    """It belongs to the code of its service."""
    (sweep,) = (await client.get("/v1/schedules", params={"owner": "billing"})).json()["items"]
    address = f"/v1/schedules/{sweep['id']}"

    changed = await client.patch(address, json={"priority": 1})
    deleted = await client.delete(address)
    paused = await client.post(f"{address}:pause")

    assert (sweep["name"], sweep["owner"]) == ("billing/sweep", "billing")
    assert [changed.status_code, deleted.status_code, paused.status_code] == [409, 409, 200]
    assert paused.json()["paused"]


async def test_the_list_has_pages(client: httpx.AsyncClient) -> None:
    """Newest first; a schedule made between two pages moves nothing."""
    names = [(await make(client, name=f"n{number}"))["name"] for number in range(5)]

    first = (await client.get("/v1/schedules", params={"limit": 3})).json()
    await make(client, name="late")
    second = (await client.get("/v1/schedules", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    wrong = await client.get("/v1/schedules", params={"cursor": "x"})

    seen = [schedule["name"] for page in (first, second) for schedule in page["items"]]
    assert seen == [*reversed(names), "billing/sweep"]
    assert second["next_cursor"] is None
    assert (wrong.status_code, pointers(wrong)) == (422, ["/query:cursor"])


async def test_fires_are_listed(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    """Each fire with its task; the schedule names the last one, and the task its schedule."""
    schedule = await make(client, cron=None, timezone="UTC", interval_seconds=1)
    address = f"/v1/schedules/{schedule['id']}"
    due = [datetime.fromisoformat(moment) for moment in schedule["next_fires"]]
    async with engine.begin() as connection:
        await fire_due(connection, due[2])
        task = (await connection.execute(select(models.tasks).order_by(models.tasks.c.id).limit(1))).one()

    first = (await client.get(f"{address}/fires", params={"limit": 2})).json()
    second = (await client.get(f"{address}/fires", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    shown = (await client.get(address)).json()

    fires = [*first["items"], *second["items"]]
    assert [datetime.fromisoformat(fire["fire_at"]) for fire in fires] == list(reversed(due[:3]))
    assert {(fire["outcome"], fire["reason"]) for fire in fires} == {("submitted", None)}
    assert second["next_cursor"] is None
    assert shown["last_task_id"] == fires[0]["task_id"]
    assert shown["last_error"] is None
    assert (str(task.schedule_id), task.service, task.version) == (schedule["id"], "billing", 3)


@pytest.mark.parametrize("path", ["", "/fires", ":pause", ":resume"])
async def test_a_schedule_that_is_not_there(client: httpx.AsyncClient, path: str) -> None:
    """Every route answers 404; an id that is none is told so."""
    method = "POST" if path.startswith(":") else "GET"

    missing = await client.request(method, f"/v1/schedules/{uuid4()}{path}")
    no_id = await client.request(method, f"/v1/schedules/nonsense{path}")

    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (no_id.status_code, no_id.json()["code"]) == (422, "invalid_request")


async def test_scopes_are_asked_for(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    """A key that may only read changes nothing."""
    schedule = await make(client)
    async with engine.begin() as connection:
        key = await auth.create_key(connection, "reader", [Scope.SCHEDULES_READ])
    headers = {"Authorization": f"Bearer {key}"}
    address = f"/v1/schedules/{schedule['id']}"

    writes = [
        await client.post("/v1/schedules", json=NIGHTLY, headers=headers),
        await client.patch(address, json={}, headers=headers),
        await client.delete(address, headers=headers),
        await client.post(f"{address}:pause", headers=headers),
    ]

    assert [response.status_code for response in writes] == [403] * 4
    assert (await client.get(address, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_merge_patch_follows_the_examples_of_its_standard(target: Any, patch: Any, merged: Any) -> None:
    """RFC 7396, appendix A."""
    assert merge_patch(target, patch) == merged
