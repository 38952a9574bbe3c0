"""Keeping schedules: what may change, and those that services announce."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import models, schedules
from gateway.schedules import Definition, Schedule
from gateway.timetable import InvalidTimetable
from taskmesh.contracts.manifest import Manifest, ScheduleManifest
from taskmesh.errors import ConflictError, NotFound

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOURLY = Definition(name="hourly", type="billing.close", cron="0 * * * *")


@pytest_asyncio.fixture
async def connection(gateway_engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction on a migrated database."""
    async with gateway_engine.connect() as connection, connection.begin():
        yield connection


async def test_a_name_is_given_once(connection: AsyncConnection) -> None:
    """A second schedule of the same name is a conflict, when made and when renamed."""
    await schedules.create(connection, HOURLY, now=NOON)
    other = await schedules.create(connection, replace(HOURLY, name="other"), now=NOON)

    with pytest.raises(ConflictError, match="this name"):
        await schedules.create(connection, HOURLY, now=NOON)
    with pytest.raises(ConflictError, match="this name"):
        await schedules.change(connection, other, HOURLY, now=NOON)


async def test_a_change_that_leaves_the_times_alone_keeps_what_is_due(connection: AsyncConnection) -> None:
    """New tags at noon do not lose the fire of noon."""
    schedule = await schedules.create(connection, HOURLY, now=NOON - timedelta(minutes=1))

    changed = await schedules.change(
        connection, schedule, replace(HOURLY, tags=["new"]), now=NOON + timedelta(seconds=1)
    )

    assert changed.tags == ["new"]
    assert changed.next_fire_at == NOON


async def test_new_times_count_from_now(connection: AsyncConnection) -> None:
    """A change from cron to an interval computes the next fire anew, anchored where the schedule was made."""
    schedule = await schedules.create(connection, HOURLY, now=NOON)

    definition = replace(HOURLY, cron=None, interval_seconds=600.0)
    changed = await schedules.change(connection, schedule, definition, now=NOON + timedelta(minutes=25))

    assert changed.next_fire_at == NOON + timedelta(minutes=30)
    assert changed.preview(3)[1:] == [NOON + timedelta(minutes=40), NOON + timedelta(minutes=50)]


async def test_a_paused_schedule_stays_paused_when_its_times_change(connection: AsyncConnection) -> None:
    """It gets its next fire when it is resumed."""
    schedule = await schedules.create(connection, replace(HOURLY, paused=True), now=NOON)

    definition = replace(HOURLY, cron="30 * * * *", paused=True)
    changed = await schedules.change(connection, schedule, definition, now=NOON)
    resumed = await schedules.resume(connection, schedule.id, now=NOON)

    assert (changed.paused, changed.next_fire_at) == (True, None)
    assert resumed.next_fire_at == NOON + timedelta(minutes=30)


async def test_a_change_to_times_that_never_come_is_refused(connection: AsyncConnection) -> None:
    """Nothing is stored."""
    schedule = await schedules.create(connection, HOURLY, now=NOON)

    with pytest.raises(InvalidTimetable, match="never fire"):
        await schedules.change(connection, schedule, replace(HOURLY, ends_at=NOON), now=NOON)


async def test_a_deleted_schedule_is_gone(connection: AsyncConnection) -> None:
    """A second deletion finds nothing."""
    schedule = await schedules.create(connection, HOURLY, now=NOON)
    await schedules.remove(connection, schedule.id)

    with pytest.raises(NotFound):
        await schedules.remove(connection, schedule.id)


def manifest(*announced: ScheduleManifest) -> Manifest:
    """Return what billing announces."""
    return Manifest(service="billing", release="1", types=(), schedules=announced, announced_at=NOON)


async def stored(connection: AsyncConnection) -> dict[str, Schedule]:
    """Return every schedule by name."""
    return {row.name: schedules.from_row(row) for row in await connection.execute(select(models.schedules))}


CLOSE = ScheduleManifest(name="close", type="billing.close", cron="30 2 * * *", timezone="Europe/Berlin")
SWEEP = ScheduleManifest(name="sweep", type="billing.sweep", payload={"limit": 5}, interval_seconds=60)


async def test_what_a_service_announces_becomes_its_schedules(connection: AsyncConnection) -> None:
    """They carry the service's name and are due from then on."""
    await schedules.sync_announced(connection, manifest(CLOSE, SWEEP))

    known = await stored(connection)
    assert set(known) == {"billing/close", "billing/sweep"}
    assert {schedule.owner for schedule in known.values()} == {"billing"}
    assert known["billing/close"].timezone == "Europe/Berlin"
    assert known["billing/sweep"].payload == {"limit": 5}
    assert all(schedule.next_fire_at for schedule in known.values())


async def test_the_same_announcement_changes_nothing(connection: AsyncConnection) -> None:
    """It comes every half a minute, and must not move a fire."""
    await schedules.sync_announced(connection, manifest(CLOSE, SWEEP))
    before = await stored(connection)

    await schedules.sync_announced(connection, manifest(SWEEP, CLOSE))

    assert await stored(connection) == before


async def test_a_new_release_changes_and_removes_its_schedules(connection: AsyncConnection) -> None:
    """What is no longer announced is gone; what reads otherwise is changed; a pause outlasts it."""
    mine = await schedules.create(connection, HOURLY, now=NOON)
    await schedules.sync_announced(connection, manifest(CLOSE, SWEEP))
    sweep = (await stored(connection))["billing/sweep"]
    await schedules.pause(connection, sweep.id, now=NOON)

    await schedules.sync_announced(connection, manifest(SWEEP.model_copy(update={"interval_seconds": 90.0})))

    known = await stored(connection)
    assert set(known) == {mine.name, "billing/sweep"}
    assert known["billing/sweep"].id == sweep.id
    assert known["billing/sweep"].interval_seconds == 90
    assert known["billing/sweep"].paused


@pytest.mark.parametrize(
    "wrong",
    [
        {"cron": "61 * * * *"},
        {"timezone": "Mars/Olympus"},
        {"interval_seconds": 5.0},
        {"cron": None, "interval_seconds": 1e300},
        {"cron": None},
    ],
)
async def test_a_wrong_announcement_leaves_what_was_there(connection: AsyncConnection, wrong: dict[str, Any]) -> None:
    """One mistake stops neither the service's other schedules nor the one that ran before."""
    await schedules.sync_announced(connection, manifest(CLOSE))
    before = (await stored(connection))["billing/close"]

    await schedules.sync_announced(connection, manifest(CLOSE.model_copy(update=wrong), SWEEP))

    known = await stored(connection)
    assert known["billing/close"] == before
    assert "billing/sweep" in known


async def test_an_announced_schedule_is_only_changed_by_its_service(connection: AsyncConnection) -> None:
    """People may pause it, and nothing else."""
    await schedules.sync_announced(connection, manifest(CLOSE))
    close = (await stored(connection))["billing/close"]

    with pytest.raises(ConflictError, match="belongs to service billing"):
        await schedules.change(connection, close, HOURLY, now=NOON)
    with pytest.raises(ConflictError, match="belongs to service billing"):
        await schedules.remove(connection, close.id)
    assert (await schedules.pause(connection, close.id, now=NOON)).paused
