"""Real scheduler processes, killed while they fire."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import models, schedules
from gateway.schedules import Definition, Outcome, Schedule
from taskmesh.outbox import outbox

logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=2)

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest_asyncio.fixture
async def start(gateway_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Call it for a scheduler process that is ready; what is left of them at the end is stopped in good order."""
    processes: list[asyncio.subprocess.Process] = []

    async def start_one(**changes: str) -> asyncio.subprocess.Process:
        health = tmp_path / str(len(processes))
        environment = {
            "PATH": os.environ["PATH"],
            "TASKMESH_DATABASE_URL": gateway_url,
            "TASKMESH_AMQP_URL": "amqp://unused",
            "TASKMESH_HEALTH_DIR": str(health),
            **changes,
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", "scheduler", env=environment)
        processes.append(process)
        async with asyncio.timeout(60):
            while not (health / "gateway-scheduler.ready").exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
        return process

    yield start_one
    for process in processes:
        if process.returncode is None:
            process.terminate()
    codes = [await asyncio.wait_for(process.wait(), 20) for process in processes]
    assert set(codes) <= {0, -signal.SIGKILL}


async def make(engine: AsyncEngine, *, for_seconds: float) -> Schedule:
    """Make a schedule that fires every two seconds from the next whole second on, and ends."""
    async with engine.begin() as connection:
        now = (await schedules.clock(connection)).replace(microsecond=0) + timedelta(seconds=1)
        ends_at = now + timedelta(seconds=for_seconds)
        definition = Definition(
            name="tick", type="billing.tick", interval_seconds=2, starts_at=now + INTERVAL, ends_at=ends_at
        )
        return await schedules.create(connection, definition, now=now)


async def until(engine: AsyncEngine, moment: datetime) -> None:
    """Return at a moment by the database's clock."""
    async with engine.connect() as connection:
        now = await schedules.clock(connection)
    await asyncio.sleep(max(0.0, (moment - now).total_seconds()))


@pytest.mark.parametrize(
    "seconds", [pytest.param(14, marks=pytest.mark.flows), pytest.param(60, marks=pytest.mark.faults)]
)
async def test_every_slot_is_fired_once_while_a_scheduler_is_killed_three_times(
    gateway_engine: AsyncEngine, start: Start, seconds: int
) -> None:
    """Two schedulers, one of them killed with SIGKILL at a slot and started again, three times."""
    await start()
    victim = await start()
    schedule = await make(gateway_engine, for_seconds=seconds)
    assert schedule.starts_at is not None
    assert schedule.ends_at is not None
    slots = schedule.fire_times().fires_between(schedule.created_at, schedule.ends_at, 1000)

    for kill in range(3):
        # A little before, at, and a little after the moment at which both reach for the slot.
        offset = timedelta(milliseconds=(-4, 2, 8)[kill])
        await until(gateway_engine, slots[len(slots) * (kill + 1) // 4] + offset)
        victim.kill()
        await victim.wait()
        victim = await start()
    await until(gateway_engine, schedule.ends_at + timedelta(seconds=2))

    async with gateway_engine.connect() as connection:
        fires = (await schedules.list_fires(connection, schedule.id, limit=1000))[::-1]
        tasks = (await connection.execute(select(models.tasks).order_by(models.tasks.c.created_at))).all()
        messages = (await connection.execute(select(outbox.c.task_id))).scalars().all()
    latest = max(fire.fired_at - fire.fire_at for fire in fires)
    counts = {"slots": len(slots), "fires": len(fires), "tasks": len(tasks), "messages": len(messages)}
    logger.info("%s, latest by %s", counts, latest)
    assert [fire.fire_at for fire in fires] == slots
    assert {fire.outcome for fire in fires} == {Outcome.SUBMITTED}
    assert sorted(task.id for task in tasks) == sorted(fire.task_id for fire in fires if fire.task_id)
    assert sorted(filter(None, messages)) == sorted(task.id for task in tasks)


@pytest.mark.flows
async def test_a_change_wakes_a_scheduler_that_sleeps(gateway_engine: AsyncEngine, start: Start) -> None:
    """A new schedule is fired on time although the next poll is far away; SIGTERM ends the sleep as well."""
    process = await start(TASKMESH_SCHEDULER_POLL_SECONDS="60")
    schedule = await make(gateway_engine, for_seconds=4)

    async with asyncio.timeout(20), gateway_engine.connect() as connection:
        while not (fires := await schedules.list_fires(connection, schedule.id, limit=2)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    process.terminate()

    assert fires[0].fired_at - fires[0].fire_at < timedelta(seconds=2)
    assert fires[0].fire_at == schedule.next_fire_at
    assert await asyncio.wait_for(process.wait(), 20) == 0
