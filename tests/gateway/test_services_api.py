"""The contract of `/v1/services`."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select

from gateway import observations
from gateway.observations import QueueFacts
from gateway.scopes import Scope
from taskmesh.contracts.control import CONTROL, Pause
from taskmesh.outbox import outbox


async def told(api) -> list[Pause]:
    async with api.engine.connect() as connection:
        rows = (await connection.execute(select(outbox).order_by(outbox.c.id))).all()
    assert {(row.exchange, row.routing_key) for row in rows} <= {("taskmesh.direct", "greeter.control")}
    return [CONTROL.validate_json(bytes(row.body)) for row in rows]  # type: ignore[misc]


async def test_services_are_listed_with_what_is_known_of_their_queues(api):
    seen = QueueFacts(
        queue="greeter", service="greeter", ready=3, unacknowledged=2, consumers=1, observed_at=datetime.now(UTC)
    )
    async with api.engine.begin() as connection:
        await observations.store_queues(connection, [seen])

    [service] = (await api.http.get("/v1/services")).json()["items"]

    assert (service["service"], service["release"], service["types"], service["paused_at"]) == ("greeter", "1", 2, None)
    assert [(queue["queue"], queue["ready"], queue["consumers"]) for queue in service["queues"]] == [("greeter", 3, 1)]


async def test_a_paused_service_is_told_so(api):
    response = await api.http.post("/v1/services/greeter:pause", json={"reason": "migration"})

    view = response.json()
    assert (response.status_code, view["pause_reason"], view["paused_at"] is not None) == (200, "migration", True)
    assert (await api.http.get("/v1/services")).json()["items"] == [view]
    assert [message.paused for message in await told(api)] == [True]


async def test_a_resumed_service_is_told_so_and_later(api):
    await api.http.post("/v1/services/greeter:pause")

    view = (await api.http.post("/v1/services/greeter:resume")).json()

    assert (view["paused_at"], view["pause_reason"]) == (None, None)
    first, second = await told(api)
    assert (first.paused, second.paused) == (True, False)
    assert first.at < second.at


async def test_a_second_pause_changes_neither_time_nor_reason(api):
    first = (await api.http.post("/v1/services/greeter:pause", json={"reason": "migration"})).json()

    second = (await api.http.post("/v1/services/greeter:pause", json={"reason": "lunch"})).json()

    assert second == first


async def test_a_service_that_never_announced_itself_is_404(api):
    response = await api.http.post("/v1/services/nobody:pause")

    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert await told(api) == []


async def test_pausing_needs_a_right_of_its_own(api):
    key = await api.new_key(Scope.TASKS_WRITE, Scope.TYPES_READ)

    response = await api.http.post("/v1/services/greeter:pause", headers={"Authorization": f"Bearer {key}"})

    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
