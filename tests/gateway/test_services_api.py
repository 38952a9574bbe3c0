"""The contract of `/v1/services`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from gateway import observations
from gateway.observations import QueueFacts
from gateway.outstanding import ASSUMED_SECONDS
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


async def see(api, *, ready: int = 0, reachable: bool = True, projectors: int = 1, seconds_ago: float = 0) -> None:
    """What the reconciler would have written down of the broker."""
    at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    figures = {"greeter": (ready, 1), "gateway.lifecycle": (5, projectors)}
    facts = [
        QueueFacts(
            queue=name,
            service=name.partition(".")[0],
            ready=messages,
            unacknowledged=0,
            consumers=consumers,
            observed_at=at,
        )
        for name, (messages, consumers) in figures.items()
    ]
    async with api.engine.begin() as connection:
        await observations.store_queues(connection, facts)
        await observations.store_broker(connection, reachable=reachable, at=at)


async def test_the_seconds_of_work_that_wait_are_told_to_whoever_may_read_services(api):
    await see(api, ready=3)
    key = await api.new_key(Scope.SERVICES_READ)

    response = await api.http.get("/v1/services/greeter/outstanding", headers={"Authorization": f"Bearer {key}"})

    view = response.json()
    assert (response.status_code, view["service"], view["waiting"]) == (200, "greeter", 3)
    assert view["work_seconds"] == 3 * ASSUMED_SECONDS


async def test_a_service_with_nothing_to_do_has_zero_seconds_of_work_while_the_broker_is_seen(api):
    await see(api)

    response = await api.http.get("/v1/services/greeter/outstanding")

    assert (response.status_code, response.json()["work_seconds"]) == (200, 0)


@pytest.mark.parametrize(
    "blindness",
    [{"reachable": False}, {"projectors": 0}, {"seconds_ago": 60}],
    ids=["broker-away", "nobody-writes-reports", "nobody-looks"],
)
@pytest.mark.parametrize("waiting", [0, 1])
async def test_a_blind_gateway_answers_with_an_error_and_never_with_zero(api, blindness, waiting):
    """Also while it knows of tasks that wait: there may be more."""
    if waiting:
        await api.http.post("/v1/tasks", json={"type": "greeter.person.greet", "payload": {"name": "Ada"}})
    await see(api, **blindness)

    response = await api.http.get("/v1/services/greeter/outstanding")

    assert (response.status_code, response.json()["code"]) == (503, "outstanding_unknown")
    assert int(response.headers["Retry-After"]) > 0
    assert "work_seconds" not in response.json()


async def test_a_gateway_that_has_never_seen_the_broker_is_blind(api):
    response = await api.http.get("/v1/services/greeter/outstanding")

    assert (response.status_code, response.json()["code"]) == (503, "outstanding_unknown")


async def test_the_work_of_a_service_that_nobody_knows_is_404(api):
    await see(api)

    response = await api.http.get("/v1/services/nobody/outstanding")

    assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_reading_the_work_of_a_service_needs_a_right_of_its_own(api):
    key = await api.new_key(Scope.TYPES_READ, Scope.SERVICES_WRITE)

    response = await api.http.get("/v1/services/greeter/outstanding", headers={"Authorization": f"Bearer {key}"})

    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
