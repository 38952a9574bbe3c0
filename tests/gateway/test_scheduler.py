"""Firing schedules: once, on time, and by the policy for what was missed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid5
from zoneinfo import ZoneInfo

import pytest
import pytest_asyncio
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import models, schedules
from gateway.scheduler import GRACE, SLOTS_A_STEP, Scheduler, find_next_fire, fire_due, plan
from gateway.schedules import Definition, Fire, Misfire, Outcome, Overlap, Reason, Schedule
from taskmesh import database
from taskmesh.health import Health
from taskmesh.outbox import outbox

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


def seconds(count: float) -> datetime:
    """Return the moment so many seconds after noon."""
    return NOON + timedelta(seconds=count)


@pytest.fixture
def engine(gateway_engine: AsyncEngine) -> AsyncEngine:
    """A migrated database of the gateway's."""
    return gateway_engine


def every_two_seconds(**changes: Any) -> Definition:
    """Return a schedule whose fires are at noon and each two seconds later."""
    definition = Definition(name="tick", type="billing.tick", interval_seconds=2, starts_at=NOON)
    return replace(definition, **changes)


async def create(engine: AsyncEngine, definition: Definition, *, now: datetime = NOON - timedelta(days=1)) -> Schedule:
    """Store a schedule as if it were `now`."""
    async with engine.begin() as connection:
        return await schedules.create(connection, definition, now=now)


async def fire(engine: AsyncEngine, now: datetime) -> list[Fire]:
    """Do the scheduler's step as if it were `now`."""
    async with engine.begin() as connection:
        return await fire_due(connection, now)


async def reread(engine: AsyncEngine, schedule: Schedule) -> Schedule:
    """Return the schedule as it is stored now."""
    async with engine.connect() as connection:
        return await schedules.get(connection, schedule.id)


def submitted(fires: list[Fire]) -> list[datetime]:
    """Return when those fires were due that became tasks."""
    return [fire.fire_at for fire in fires if fire.outcome is Outcome.SUBMITTED]


def missed(fires: list[Fire]) -> list[tuple[datetime, datetime | None]]:
    """Return the first and the last of the fires that were left out because nobody was there."""
    return [(fire.fire_at, fire.missed_until) for fire in fires if fire.reason is Reason.MISSED]


async def test_a_fire_becomes_a_task_and_a_message_in_one_transaction(engine: AsyncEngine) -> None:
    """The task's id is derived from the schedule and the fire time; rolled back, nothing is left."""
    schedule = await create(engine, every_two_seconds(payload={"a": 1}, tags=["x"], priority=7))
    async with engine.connect() as connection:
        await fire_due(connection, seconds(0.1))
        await connection.rollback()
        assert (await connection.execute(select(func.count()).select_from(models.tasks))).scalar_one() == 0

    fires = await fire(engine, seconds(0.1))

    assert submitted(fires) == [NOON]
    async with engine.connect() as connection:
        task = (await connection.execute(select(models.tasks))).one()
        message = (await connection.execute(select(outbox))).one()
    assert task.id == fires[0].task_id == uuid5(schedule.id, "2026-06-01T12:00:00+00:00")
    assert (task.type, task.payload, task.tags, task.priority) == ("billing.tick", {"a": 1}, ["x"], 7)
    assert task.schedule_id == schedule.id
    assert message.task_id == task.id
    stored = await reread(engine, schedule)
    assert (stored.last_fire_at, stored.last_task_id, stored.next_fire_at) == (NOON, task.id, seconds(2))


async def test_nothing_is_fired_early_or_twice(engine: AsyncEngine) -> None:
    """A fire is due at its very moment, and only once."""
    await create(engine, every_two_seconds())

    assert await fire(engine, seconds(-0.001)) == []
    assert submitted(await fire(engine, NOON)) == [NOON]
    assert await fire(engine, NOON) == []
    assert await fire(engine, seconds(1.999)) == []


async def test_a_slot_that_was_fired_is_not_fired_again_after_the_clock_was_set_back(engine: AsyncEngine) -> None:
    """Even if `next_fire_at` went back, the slot is claimed for good."""
    schedule = await create(engine, every_two_seconds())
    await fire(engine, NOON)
    async with engine.begin() as connection:
        await connection.execute(update(models.schedules).values(next_fire_at=NOON))

    assert await fire(engine, NOON) == []
    assert (await reread(engine, schedule)).next_fire_at == seconds(2)


async def test_a_fire_that_is_a_little_late_is_on_time(engine: AsyncEngine) -> None:
    """Within the grace every slot is fired, whatever the policy: a busy moment is not downtime."""
    await create(engine, every_two_seconds(misfire=Misfire.SKIP))

    fires = await fire(engine, NOON + GRACE)

    assert submitted(fires) == [NOON, seconds(2), seconds(4)]


async def test_skip_leaves_out_what_was_missed(engine: AsyncEngine) -> None:
    """After downtime only the newest fire may run, and only if it is on time by itself."""
    schedule = await create(engine, every_two_seconds(interval_seconds=60, misfire=Misfire.SKIP))

    fires = await fire(engine, seconds(10 * 60 + 30))

    assert submitted(fires) == []
    assert missed(fires) == [(NOON, seconds(600))]
    assert (await reread(engine, schedule)).next_fire_at == seconds(11 * 60)
    later = await fire(engine, seconds(20 * 60 + 1))
    assert submitted(later) == [seconds(20 * 60)]
    assert missed(later) == [(seconds(11 * 60), seconds(19 * 60))]


async def test_once_makes_up_one_for_all_that_was_missed(engine: AsyncEngine) -> None:
    """The newest is run; the others are recorded as missed."""
    schedule = await create(engine, every_two_seconds(misfire=Misfire.ONCE))

    fires = await fire(engine, seconds(3601))

    assert submitted(fires) == [seconds(3600)]
    assert missed(fires) == [(NOON, seconds(3598))]
    assert (await reread(engine, schedule)).next_fire_at == seconds(3602)


async def test_once_makes_up_a_single_missed_night(engine: AsyncEngine) -> None:
    """One missed fire is made up however late, and nothing is recorded as missed."""
    await create(engine, Definition(name="nightly", type="billing.close", cron="30 2 * * *"), now=NOON)

    fires = await fire(engine, NOON + timedelta(hours=20))

    assert submitted(fires) == [datetime(2026, 6, 2, 2, 30, tzinfo=UTC)]
    assert len(fires) == 1


async def test_all_makes_up_each_within_the_window(engine: AsyncEngine) -> None:
    """Older ones are recorded as missed."""
    await create(engine, every_two_seconds(misfire=Misfire.ALL, misfire_window_seconds=20))

    fires = await fire(engine, seconds(101))

    assert submitted(fires) == [seconds(second) for second in range(82, 101, 2)]
    assert missed(fires) == [(NOON, seconds(80))]


async def test_all_makes_up_a_long_backlog_in_several_transactions(engine: AsyncEngine) -> None:
    """Each transaction stays short; together they leave out nothing."""
    await create(engine, every_two_seconds(misfire=Misfire.ALL, misfire_window_seconds=3600))

    fires: list[Fire] = []
    while step := await fire(engine, seconds(1000)):
        assert len(step) <= SLOTS_A_STEP
        fires += step

    assert submitted(fires) == [seconds(second) for second in range(0, 1001, 2)]


async def test_overlap_skip_waits_for_the_last_task(engine: AsyncEngine) -> None:
    """A fire is left out, and recorded, while the task of the last one is still going."""
    schedule = await create(engine, every_two_seconds(overlap=Overlap.SKIP))
    await fire(engine, seconds(0))

    going = await fire(engine, seconds(2))
    async with engine.begin() as connection:
        await connection.execute(update(models.tasks).values(state="succeeded"))
    ended = await fire(engine, seconds(4))

    assert [(f.outcome, f.reason, f.task_id) for f in going] == [(Outcome.SKIPPED, Reason.OVERLAP, None)]
    assert submitted(ended) == [seconds(4)]
    assert (await reread(engine, schedule)).last_fire_at == seconds(4)


async def test_overlap_skip_also_holds_between_made_up_fires(engine: AsyncEngine) -> None:
    """The first of several made-up fires keeps the others out."""
    await create(engine, every_two_seconds(overlap=Overlap.SKIP, misfire=Misfire.ALL))

    fires = await fire(engine, seconds(20))

    assert submitted(fires) == [NOON]
    assert {f.reason for f in fires[1:]} == {Reason.OVERLAP}


async def test_what_was_missed_while_paused_is_not_made_up(engine: AsyncEngine) -> None:
    """A paused schedule does not fire; resumed, it goes on with the next fire."""
    schedule = await create(engine, every_two_seconds(misfire=Misfire.ALL))
    async with engine.begin() as connection:
        paused = await schedules.pause(connection, schedule.id, now=seconds(0.5))

    while_paused = await fire(engine, seconds(10))
    async with engine.begin() as connection:
        resumed = await schedules.resume(connection, schedule.id, now=seconds(11))

    assert (paused.paused, paused.next_fire_at, paused.preview(5)) == (True, None, [])
    assert while_paused == []
    assert (resumed.paused, resumed.next_fire_at) == (False, seconds(12))
    assert submitted(await fire(engine, seconds(12))) == [seconds(12)]


async def test_resuming_a_schedule_that_is_not_paused_keeps_what_is_due(engine: AsyncEngine) -> None:
    """A second click on resume loses no fire."""
    schedule = await create(engine, every_two_seconds())
    async with engine.begin() as connection:
        await schedules.resume(connection, schedule.id, now=seconds(1))

    assert submitted(await fire(engine, seconds(1))) == [NOON]


async def test_a_schedule_ends(engine: AsyncEngine) -> None:
    """After its last fire it has no next one and is never due again."""
    schedule = await create(engine, every_two_seconds(ends_at=seconds(2)))

    fires = await fire(engine, seconds(2)) + await fire(engine, seconds(4))

    assert submitted(fires) == [NOON, seconds(2)]
    assert (await reread(engine, schedule)).next_fire_at is None


async def test_a_type_that_nobody_announces_is_submitted_and_recorded(engine: AsyncEngine) -> None:
    """The worker may come back: the task waits for it, and the schedule says so."""
    schedule = await create(engine, every_two_seconds())

    fires = await fire(engine, NOON)

    assert [(f.outcome, f.reason) for f in fires] == [(Outcome.SUBMITTED, Reason.UNKNOWN_TYPE)]
    assert (await reread(engine, schedule)).last_error == "no service announces billing.tick: its tasks wait for one"


async def test_a_schedule_that_cannot_be_fired_does_not_hold_up_the_others(engine: AsyncEngine) -> None:
    """It is put off, says why, and loses no fire once it is mended."""
    broken = await create(engine, every_two_seconds(name="broken", misfire=Misfire.ALL))
    await create(engine, every_two_seconds(name="sound"))
    async with engine.begin() as connection:
        await connection.execute(text("update schedules set timezone = 'Nowhere/Gone' where name = 'broken'"))

    first = await fire(engine, NOON)
    stored = await reread(engine, broken)
    async with engine.begin() as connection:
        await connection.execute(text("update schedules set timezone = 'UTC' where name = 'broken'"))
    at_once = await fire(engine, seconds(2))
    after_a_while = await fire(engine, seconds(31))

    assert [f.schedule_id == broken.id for f in first] == [False]
    assert stored.last_error == "could not be fired: InvalidTimetable"
    assert stored.next_fire_at == NOON
    assert broken.id not in {f.schedule_id for f in at_once}
    made_up = [f.fire_at for f in after_a_while if f.schedule_id == broken.id]
    assert made_up == [seconds(second) for second in range(0, 31, 2)]
    assert (await reread(engine, broken)).retry_at is None


async def test_a_nightly_fires_once_each_night_of_2026_in_berlin(engine: AsyncEngine) -> None:
    """02:30 Europe/Berlin, simulated through the real step: 365 nights, 365 fires, across both clock changes."""
    berlin = ZoneInfo("Europe/Berlin")
    nightly = Definition(name="nightly", type="billing.close", cron="30 2 * * *", timezone="Europe/Berlin")
    now = datetime(2026, 1, 1, tzinfo=berlin).astimezone(UTC)
    end = datetime(2027, 1, 1, tzinfo=berlin).astimezone(UTC)
    await create(engine, nightly, now=now)

    fires = []
    while now < end:
        # Every quarter of an hour around the clock changes, once a day otherwise.
        changing = now.date() in {datetime(2026, month, day, tzinfo=UTC).date() for month, day in CHANGES}
        now += timedelta(minutes=15) if changing else timedelta(days=1)
        fires += await fire(engine, now)

    nights = [f.fire_at.astimezone(berlin).date() for f in fires if f.outcome is Outcome.SUBMITTED]
    assert len(nights) == len(set(nights)) == 365
    assert [f for f in fires if f.outcome is Outcome.SKIPPED] == []
    spring, autumn = (
        f for f in fires if f.fire_at.astimezone(berlin).date().isoformat() in {"2026-03-29", "2026-10-25"}
    )
    assert spring.fire_at == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    assert autumn.fire_at == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)


CHANGES = [(3, 28), (3, 29), (10, 24), (10, 25)]


async def test_the_next_fire_is_the_earliest_of_those_that_can_fire(engine: AsyncEngine) -> None:
    """Paused ones do not count."""
    await create(engine, every_two_seconds(name="early", paused=True))
    await create(engine, every_two_seconds(name="late", starts_at=seconds(60)))

    async with engine.connect() as connection:
        assert await find_next_fire(connection) == seconds(60)


@pytest.mark.parametrize("misfire", list(Misfire))
@pytest.mark.parametrize("late", [0.0, 1.0, 4.9, 5.1, 7.0, 60.0, 3599.0, 3700.0, 100_000.0])
def test_a_plan_always_moves_on(misfire: Misfire, late: float) -> None:
    """However late: the next fire is later than all that was dealt with, and nothing is dealt with twice."""
    values = vars_of(every_two_seconds(misfire=misfire))
    schedule = Schedule(id=uuid5(schedules.ANNOUNCED, "x"), created_at=NOON, updated_at=NOON, **values)

    planned = plan(schedule, NOON, seconds(late))

    assert planned.next_fire_at is not None
    dealt_with = [*(planned.missed or ()), *planned.slots]
    assert dealt_with == sorted(dealt_with)
    assert dealt_with[0] == NOON
    assert max(dealt_with) < planned.next_fire_at
    assert len(planned.slots) <= SLOTS_A_STEP
    if len(planned.slots) < SLOTS_A_STEP:
        assert planned.next_fire_at > seconds(late)


def vars_of(definition: Definition) -> dict[str, Any]:
    """Return the fields of a definition."""
    names: Callable[[Definition], dict[str, Any]] = schedules._columns
    return names(definition)


async def test_many_schedulers_at_once_fire_each_slot_once(engine: AsyncEngine) -> None:
    """Four schedulers race through two minutes of ten schedules: 610 slots, 610 tasks."""
    ticks = [await create(engine, every_two_seconds(name=f"tick {n}")) for n in range(10)]

    async def race(now: datetime) -> list[Fire]:
        together = await asyncio.gather(*(fire(engine, now) for _ in range(4)))
        return [each for fires in together for each in fires]

    fires: list[Fire] = []
    for step in range(0, 121, 4):
        fires += await race(seconds(step))
        # What one scheduler had locked, another passed over; it is due in the next turn.
        fires += await race(seconds(step))

    expected = {(tick.id, seconds(second)) for tick in ticks for second in range(0, 121, 2)}
    assert len(fires) == len(expected)
    assert {(each.schedule_id, each.fire_at) for each in fires} == expected
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(models.tasks))).scalar_one() == len(expected)
        assert (await connection.execute(select(func.count()).select_from(outbox))).scalar_one() == len(expected)


FIRE_AND_HANG = """
import asyncio, sys
from datetime import datetime
from gateway.scheduler import fire_due
from taskmesh.database import async_engine

async def main():
    async with async_engine(sys.argv[1]).begin() as connection:
        fires = await fire_due(connection, datetime.fromisoformat(sys.argv[2]))
        print(len(fires), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_scheduler_killed_before_its_commit_loses_no_fire(engine: AsyncEngine, gateway_url: str) -> None:
    """While it lives its schedule is left to it; killed with everything written, another fires the slot."""
    schedule = await create(engine, every_two_seconds())
    arguments = (sys.executable, "-c", FIRE_AND_HANG, gateway_url, NOON.isoformat())
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"1\n"

    while_it_lives = await fire(engine, NOON)
    process.kill()
    await process.wait()
    async with engine.begin() as connection:
        # Waits until PostgreSQL has noticed the death and undone the work.
        await schedules.get(connection, schedule.id, lock=True)
    afterwards = await fire(engine, NOON)

    assert while_it_lives == []
    assert submitted(afterwards) == [NOON]


@pytest_asyncio.fixture
async def scheduler(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Scheduler]:
    """A scheduler that runs for as long as the test."""
    scheduler = Scheduler(engine, Health(tmp_path, "gateway-scheduler"), poll_seconds=0.2)
    stop = asyncio.Event()
    running = asyncio.create_task(scheduler.run(stop))
    yield scheduler
    stop.set()
    await asyncio.wait_for(running, 10)


async def wait_for_end(engine: AsyncEngine, schedule: Schedule) -> None:
    """Return when a schedule with an end has fired for the last time."""
    async with asyncio.timeout(30):
        while (await reread(engine, schedule)).next_fire_at is not None:  # noqa: ASYNC110 - another process sets it
            await asyncio.sleep(0.1)


async def test_the_running_scheduler_fires_by_the_clock_of_the_database(
    engine: AsyncEngine, scheduler: Scheduler
) -> None:
    """Three real seconds give three tasks, each within its second."""
    async with engine.begin() as connection:
        now = await schedules.clock(connection)
        definition = Definition(name="tick", type="a.b", interval_seconds=1, ends_at=now + timedelta(seconds=3))
        schedule = await schedules.create(connection, definition, now=now)

    await wait_for_end(engine, schedule)

    async with engine.connect() as connection:
        fires = await schedules.list_fires(connection, schedule.id, limit=10)
    assert [each.fire_at for each in reversed(fires)] == [now + timedelta(seconds=second) for second in (1, 2, 3)]
    assert all(each.fired_at - each.fire_at < timedelta(seconds=1) for each in fires)


async def test_the_scheduler_outlasts_the_database(engine: AsyncEngine, scheduler: Scheduler, postgres: str) -> None:
    """Its connections are cut again and again; it goes on and loses no fire."""
    async with engine.begin() as connection:
        now = await schedules.clock(connection)
        definition = Definition(name="tick", type="a.b", interval_seconds=1, ends_at=now + timedelta(seconds=4))
        schedule = await schedules.create(connection, definition, now=now)
    cut = text(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = :name and pid <> pg_backend_pid()"
    )
    admin = database.async_engine(postgres)

    for _ in range(5):
        async with admin.connect() as connection:
            await connection.execute(cut, {"name": engine.url.database})
        await asyncio.sleep(0.3)
    await admin.dispose()
    await engine.dispose()
    await wait_for_end(engine, schedule)

    async with engine.connect() as connection:
        fires = await schedules.list_fires(connection, schedule.id, limit=10)
    assert [each.fire_at for each in reversed(fires)] == [now + timedelta(seconds=second) for second in (1, 2, 3, 4)]


async def test_old_fires_are_forgotten(engine: AsyncEngine) -> None:
    """Those older than the widest window go; the others stay."""
    schedule = await create(engine, every_two_seconds())
    await fire(engine, NOON)
    await fire(engine, NOON + timedelta(days=1))

    async with engine.begin() as connection:
        forgotten = await schedules.prune_fires(connection, now=NOON + timedelta(days=30, seconds=1), limit=100)
        kept = await schedules.list_fires(connection, schedule.id, limit=10)

    assert forgotten == 1
    assert {each.fired_at for each in kept} == {NOON + timedelta(days=1)}
