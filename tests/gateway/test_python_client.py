"""The Python client against the real gateway: what one writes, the other reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gateway.scopes import Scope
from taskmesh import client
from taskmesh.client import AsyncTaskmesh, Submission, TaskState
from taskmesh.outbox import outbox

GREET = "greeter.person.greet"


@pytest_asyncio.fixture
async def mesh(api) -> AsyncIterator[AsyncTaskmesh]:
    async with AsyncTaskmesh(api.url, api.key) as connected:
        yield connected


async def test_a_submitted_task_can_be_read_again(mesh):
    task = await mesh.submit(GREET, {"name": "Ada"}, tags=["x", "y"], priority=3)

    assert (task.state, task.tags, task.priority) == (TaskState.QUEUED, ("x", "y"), 3)
    again = await mesh.get(task.id)
    assert again.payload == {"name": "Ada"}
    assert again.root_id == task.id


async def test_one_key_is_one_task_and_another_body_is_a_conflict(mesh):
    first, second = await asyncio.gather(*[mesh.submit(GREET, {"name": "Ada"}, idempotency_key="k") for _ in range(2)])

    assert first.id == second.id
    with pytest.raises(client.IdempotencyConflict):
        await mesh.submit(GREET, {"name": "Grace"}, idempotency_key="k")


async def test_refusals_point_at_the_field(mesh):
    with pytest.raises(client.PayloadRefused) as refused:
        await mesh.submit(GREET, {"name": "", "times": 1.5})
    with pytest.raises(client.UnknownType) as unknown:
        await mesh.submit("greeter.person.gret", {})
    with pytest.raises(client.PayloadRefused) as batch:
        await mesh.submit_many([Submission(type=GREET, payload={"name": "Ada"}), Submission(type=GREET, payload={})])

    assert {error.pointer for error in refused.value.errors} == {"/payload/name", "/payload/times"}
    assert unknown.value.nearest == (GREET,)
    assert [error.pointer for error in batch.value.errors] == ["/tasks/1/payload/name"]


async def test_a_wrong_key_a_missing_scope_and_a_missing_task_are_told_apart(api, mesh):
    reader = await api.new_key(Scope.TASKS_READ)

    async with AsyncTaskmesh(api.url, "wrong") as stranger:
        with pytest.raises(client.Unauthenticated):
            await stranger.types()
    async with AsyncTaskmesh(api.url, reader) as limited:
        with pytest.raises(client.Forbidden):
            await limited.submit(GREET, {"name": "Ada"})
    with pytest.raises(client.NoSuchResource):
        await mesh.get("01980000-0000-7000-8000-000000000001")


async def test_a_batch_is_listed_newest_first_over_several_pages(mesh):
    submitted = await mesh.submit_many([Submission(type=GREET, payload={"name": "Ada"}, tags=["b"])] * 5)
    await mesh.submit(GREET, {"name": "Grace"})

    listed = [task async for task in mesh.list(tag="b", type=GREET, state=TaskState.QUEUED, page_size=2)]

    assert {task.id for task in listed} == {task.id for task in submitted}
    assert len(listed) == 5


async def test_waiting_for_a_task_that_nobody_runs_is_over_in_time(mesh):
    task = await mesh.submit(GREET, {"name": "Ada"}, wait=1)

    assert task.state is TaskState.QUEUED
    with pytest.raises(client.WaitTimeout):
        await mesh.wait(task.id, timeout=1)


async def test_the_events_of_a_waiting_task_begin_with_its_first_state(mesh):
    task = await mesh.submit(GREET, {"name": "Ada"}, delay=3600)

    change = await anext(aiter(mesh.events(task.id)))

    assert (change.task_id, change.state) == (task.id, TaskState.SCHEDULED)


async def test_types_come_with_the_schema_that_was_announced(mesh):
    announced = {one.type: one for one in await mesh.types()}

    assert announced[GREET] == await mesh.type(GREET)
    assert announced[GREET].payload_schema["required"] == ["name"]
    with pytest.raises(client.UnknownType):
        await mesh.type("greeter.person.gret")


async def test_a_schedule_goes_through_its_life(mesh):
    made = await mesh.schedules.create("nightly", GREET, {"name": "Ada"}, cron="30 2 * * *", timezone="Europe/Berlin")
    with pytest.raises(client.Conflict):
        await mesh.schedules.create("nightly", GREET, {"name": "Ada"}, interval_seconds=60)

    paused = await mesh.schedules.pause(made.id)
    resumed = await mesh.schedules.resume(made.id)
    changed = await mesh.schedules.update(made.id, cron=None, interval_seconds=60)

    assert made.next_fires[0] == made.next_fire_at
    assert (paused.paused, paused.next_fire_at) == (True, None)
    assert (resumed.paused, resumed.next_fire_at) == (False, made.next_fire_at)
    assert changed.rhythm == "every 60 s"
    assert [schedule.id async for schedule in mesh.schedules.list()] == [made.id]
    await mesh.schedules.delete(made.id)
    with pytest.raises(client.NoSuchResource):
        await mesh.schedules.get(made.id)


async def test_a_task_is_cancelled_explained_and_tried_again(mesh):
    task = await mesh.submit(GREET, {"name": "Ada"}, delay=3600)

    before = await mesh.explain(task.id)
    cancelled = await mesh.cancel(task.id, reason="a mistake")
    after = await mesh.explain(task.id)
    again = await mesh.retry(task.id)

    assert (before.reason, after.reason, before.next_at) == ("scheduled", "finished", task.due_at)
    assert (cancelled.outcome, cancelled.task.cancel_reason) == ("cancelled", "a mistake")
    assert (again.retry_of, (await mesh.get(task.id)).retried_as) == (task.id, again.id)
    with pytest.raises(client.Conflict, match="already_retried"):
        await mesh.retry(task.id)


async def test_a_cancellation_is_waited_for_as_long_as_was_asked(api, mesh):
    task = await mesh.submit(GREET, {"name": "Ada"})
    async with api.engine.begin() as connection:
        await connection.execute(outbox.delete())

    answer = await mesh.cancel(task.id, wait=1)

    assert (answer.outcome, answer.settled) == ("requested", False)


async def test_a_service_is_paused_and_resumed(mesh):
    paused = await mesh.pause_service("greeter", reason="migration")
    [listed] = await mesh.services()
    resumed = await mesh.resume_service("greeter")

    assert (paused.pause_reason, listed, resumed.paused_at) == ("migration", paused, None)
