"""What a service has to do is known from the ledger and the broker, and is never said to be nothing blindly."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text, update

from gateway import catalogue, ledger, observations, outstanding, run_times
from gateway.models import tasks
from gateway.new_tasks import NewTask
from gateway.observations import QueueFacts
from gateway.outstanding import ASSUMED_SECONDS, Outstanding
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.contracts.manifest import Manifest, TypeManifest

GREET = "greeter.person.greet"
WAVE = "greeter.person.wave"


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


class Ledger:
    """The gateway's database, and a broker of which only the figures exist."""

    def __init__(self, engine) -> None:
        self.engine = engine

    async def accept(self, count: int = 1, **fields: Any) -> list[UUID]:
        new = [NewTask(**{"type": GREET, "service": "greeter", "payload": {}, **fields}) for _ in range(count)]
        async with self.engine.begin() as connection:
            await ledger.submit(connection, new)
        return [task.id for task in new]

    async def hear(self, task_id: UUID, state: TaskState, at: datetime, **fields: Any) -> None:
        event = LifecycleEvent(task_id=task_id, type=GREET, service="greeter", state=state, at=at, **fields)
        async with self.engine.begin() as connection:
            assert await ledger.advance(connection, [event])

    async def ran(self, type_name: str, *seconds: float) -> None:
        heard = run_times.RunTimes()
        for each in seconds:
            heard.add("greeter", type_name, each)
        async with self.engine.begin() as connection:
            await run_times.store(connection, heard.take())

    async def observe(
        self, *, reachable: bool = True, ready: int = 0, projectors: int = 1, reports: int = 0, seconds_ago: float = 0
    ) -> None:
        at = ago(seconds_ago)
        figures = {
            "greeter": (ready, 1),
            "greeter.control": (7, 1),
            "gateway.lifecycle": (reports, projectors),
        }
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
        async with self.engine.begin() as connection:
            await observations.store_queues(connection, facts)
            await observations.store_broker(connection, reachable=reachable, at=at)

    async def read(self, **options: Any) -> dict[str, Outstanding]:
        async with self.engine.connect() as connection:
            return await outstanding.read(connection, **options)

    async def greeter(self) -> Outstanding:
        return (await self.read())["greeter"]


@pytest.fixture
async def known(gateway_engine):
    """A ledger to which one service has announced itself, and whose broker is seen."""
    types = (TypeManifest(type=GREET, kind=TaskKind.COMMAND, queue="greeter", payload_schema={"type": "object"}),)
    announced = Manifest(service="greeter", release="1", types=types, announced_at=datetime.now(UTC))
    async with gateway_engine.begin() as connection:
        await catalogue.store(connection, announced)
    made = Ledger(gateway_engine)
    await made.observe()
    return made


async def test_a_service_without_tasks_has_nothing_to_do(known):
    idle = await known.greeter()

    assert (idle.waiting, idle.oldest_age_seconds, idle.work_seconds, idle.is_certain) == (0, 0.0, 0.0, True)


async def test_work_is_the_mean_run_time_of_each_type_times_its_waiting_tasks(known):
    await known.ran(GREET, 1.0, 3.0)
    await known.ran(WAVE, 10.0)
    await known.accept(3)
    await known.accept(2, type=WAVE)

    busy = await known.greeter()

    assert (busy.waiting, busy.work_seconds) == (5, 3 * 2.0 + 2 * 10.0)


async def test_a_type_that_never_ran_is_taken_to_run_like_its_service_or_for_a_second(known):
    await known.accept(2)
    assert (await known.greeter()).work_seconds == 2 * ASSUMED_SECONDS

    await known.ran(WAVE, 4.0)

    assert (await known.greeter()).work_seconds == 2 * 4.0


async def test_tasks_count_from_a_minute_before_they_are_due_and_grow_old_from_then_on(known):
    await known.accept(due_at=ago(-3600))
    assert (await known.greeter()).waiting == 0

    await known.accept(due_at=ago(-30))

    soon = await known.greeter()
    assert (soon.waiting, soon.oldest_age_seconds) == (1, 0.0)


async def test_the_oldest_task_is_the_one_that_has_been_due_longest(known):
    await known.accept(created_at=ago(50))
    await known.accept(created_at=ago(500), due_at=ago(20))

    assert (await known.greeter()).oldest_age_seconds == pytest.approx(50, abs=5)


async def test_a_running_task_does_not_wait_and_one_that_lost_its_worker_waits_from_then_on(known):
    [task_id] = await known.accept(created_at=ago(900))
    await known.hear(task_id, TaskState.RUNNING, ago(600), started_at=ago(600))
    assert (await known.greeter()).waiting == 0

    lost = TaskFailure(code="worker_lost", message="gone")
    await known.hear(task_id, TaskState.QUEUED, ago(40), failure=lost)

    waiting = await known.greeter()
    assert (waiting.waiting, waiting.oldest_age_seconds) == (1, pytest.approx(40, abs=5))


async def test_a_retry_waits_from_when_it_is_due(known):
    [task_id] = await known.accept(created_at=ago(900))
    await known.hear(task_id, TaskState.RETRYING, ago(600), started_at=ago(601), due_at=ago(30))

    assert (await known.greeter()).oldest_age_seconds == pytest.approx(30, abs=5)


async def test_messages_of_tasks_that_the_ledger_has_not_heard_of_are_work_of_unknown_age(known):
    await known.ran(GREET, 2.0)
    await known.observe(ready=10)
    strange = await known.greeter()
    assert (strange.waiting, strange.oldest_age_seconds, strange.work_seconds) == (10, None, 20.0)

    await known.accept(4, created_at=ago(60))

    busy = await known.greeter()
    assert (busy.waiting, busy.work_seconds) == (10, 20.0)
    assert busy.oldest_age_seconds == pytest.approx(60, abs=5)


@pytest.mark.parametrize(
    "blind",
    [{"reachable": False}, {"seconds_ago": 120}, {"projectors": 0, "reports": 1}],
    ids=["broker away", "nobody looks", "nobody writes reports down"],
)
async def test_nothing_is_not_said_blindly(known, blind):
    await known.observe(**blind)
    unknown = await known.greeter()
    assert (unknown.oldest_age_seconds, unknown.work_seconds, unknown.is_certain) == (None, None, False)

    await known.accept(created_at=ago(60))

    at_least = await known.greeter()
    assert at_least.oldest_age_seconds == pytest.approx(60, abs=5)
    assert (at_least.work_seconds, at_least.is_certain) == (ASSUMED_SECONDS, False)


async def test_one_service_can_be_asked_for(known):
    await known.accept(service="waver", type="waver.hand.wave")

    assert set(await known.read()) == {"greeter", "waver"}
    assert set(await known.read(only="waver")) == {"waver"}
    assert not await known.read(only="nobody")


async def test_means_forget_old_runs(known):
    await known.ran(GREET, *[1.0] * 10_000)
    await known.ran(GREET, *[3.0] * run_times.MEMORY)

    async with known.engine.connect() as connection:
        assert await run_times.means(connection) == {("greeter", GREET): 2.0}


async def test_finished_tasks_are_not_read(known):
    """However many there are: the plan reads the index of waiting tasks, and that alone."""
    ids = await known.accept(2000)
    async with known.engine.begin() as connection:
        await connection.execute(
            update(tasks).where(tasks.c.id.in_(ids)).values(state="succeeded", finished_at=datetime.now(UTC))
        )
    async with known.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("analyze tasks"))
        explain = text("explain " + outstanding._WAITING.text)
        plan = (await connection.execute(explain, {"until": datetime.now(UTC), "only": None})).scalars().all()

    assert any("tasks_waiting" in line for line in plan), plan
    assert not any("Seq Scan" in line for line in plan), plan
