"""Another try of a task that ended badly is a task of its own, linked both ways."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select

from gateway import ledger, retries
from gateway.models import dead_letters, tasks
from gateway.retries import Origin
from gateway.scopes import Scope
from taskmesh import celery_protocol
from taskmesh.celery_protocol import EVENT_ID_HEADER
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.outbox import outbox

BAD_ENDS = (TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED)


def ended(task_id: UUID, state: TaskState, **fields: Any) -> LifecycleEvent:
    """What a worker says of the end of a task."""
    failure = TaskFailure(code="rejected", message="no") if state is TaskState.FAILED else None
    values: dict[str, Any] = {"type": "greeter.person.greet", "service": "greeter", "failure": failure} | fields
    return LifecycleEvent(task_id=task_id, state=state, at=datetime.now(UTC), **values)


async def end(engine, task_id: UUID, state: TaskState, **fields: Any) -> None:
    async with engine.begin() as connection:
        await ledger.advance(connection, [ended(task_id, state, **fields)])


async def submitted(engine, **fields: Any) -> UUID:
    values: dict[str, Any] = {"type": "greeter.person.greet", "service": "greeter", "payload": {"name": "Ada"}} | fields
    new = ledger.NewTask(**values)
    async with engine.begin() as connection:
        await ledger.submit(connection, [new])
    return new.id


async def retry(engine, task_id: UUID, **options: Any) -> UUID:
    async with engine.begin() as connection:
        return (await retries.retry(connection, task_id, **options)).id


async def row_of(engine, task_id: UUID) -> Any:
    async with engine.connect() as connection:
        return await ledger.get_task(connection, task_id)


async def message_of(engine, task_id: UUID) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(select(outbox).where(outbox.c.task_id == task_id))).one()


@pytest.mark.parametrize("state", BAD_ENDS)
async def test_a_task_that_ended_badly_is_tried_again_as_a_new_one(gateway_engine, state):
    old_id = await submitted(gateway_engine, priority=3, tags=["nightly"], expires_at=datetime.now(UTC))
    await end(gateway_engine, old_id, state)

    new_id = await retry(gateway_engine, old_id)

    old, new = await row_of(gateway_engine, old_id), await row_of(gateway_engine, new_id)
    assert (old.state, old.retried_as, new.state, new.retry_of, new.root_id) == (
        state,
        new_id,
        "queued",
        old_id,
        old_id,
    )
    assert (new.payload, new.priority, new.tags, new.expires_at) == ({"name": "Ada"}, 3, ["nightly"], None)
    message = await message_of(gateway_engine, new_id)
    task = celery_protocol.decode(message.headers, message.properties, bytes(message.body))
    assert (message.exchange, message.routing_key) == ("taskmesh.commands", "greeter.person.greet")
    assert (task.id, task.root_id, task.payload) == (new_id, old_id, {"name": "Ada"})


async def test_a_listeners_task_is_tried_again_in_its_own_services_queue_alone(gateway_engine):
    event_id, root = uuid4(), await submitted(gateway_engine)
    old_id = celery_protocol.listener_task_id(event_id, "email")
    told: dict[str, Any] = {
        "type": "billing.document.ready",
        "service": "email",
        "kind": TaskKind.EVENT,
        "event_id": event_id,
        "root_id": root,
        "parent_id": root,
    }
    await end(gateway_engine, old_id, TaskState.FAILED, **told)

    new_id = await retry(gateway_engine, old_id, payload={"n": 1})

    new, message = await row_of(gateway_engine, new_id), await message_of(gateway_engine, new_id)
    assert (new.kind, new.event_id, new.root_id, new.parent_id) == ("event", event_id, root, root)
    assert (message.exchange, message.routing_key, message.mandatory) == ("taskmesh.direct", "email.events", True)
    assert message.headers[EVENT_ID_HEADER] == str(event_id)
    task = celery_protocol.decode(message.headers, message.properties, bytes(message.body))
    assert (task.id, task.kind, task.payload) == (new_id, TaskKind.EVENT, {"n": 1})


async def test_a_task_that_is_not_over_is_not_tried_again(gateway_engine):
    task_id = await submitted(gateway_engine)

    with pytest.raises(retries.NotFailed):
        await retry(gateway_engine, task_id)


async def test_a_task_that_succeeded_is_not_tried_again(gateway_engine):
    task_id = await submitted(gateway_engine)
    await end(gateway_engine, task_id, TaskState.SUCCEEDED)

    with pytest.raises(retries.NotFailed):
        await retry(gateway_engine, task_id)


async def test_a_task_whose_payload_nobody_knows_needs_one(gateway_engine):
    task_id = uuid4()
    await end(gateway_engine, task_id, TaskState.FAILED)

    with pytest.raises(retries.PayloadUnknown):
        await retry(gateway_engine, task_id)


async def test_a_second_retry_is_refused_and_names_the_first(gateway_engine):
    task_id = await submitted(gateway_engine)
    await end(gateway_engine, task_id, TaskState.FAILED)
    new_id = await retry(gateway_engine, task_id)

    with pytest.raises(retries.AlreadyRetried, match=str(new_id)):
        await retry(gateway_engine, task_id)


async def test_a_retry_that_failed_as_well_is_what_is_tried_again(gateway_engine):
    first = await submitted(gateway_engine)
    await end(gateway_engine, first, TaskState.FAILED)
    second = await retry(gateway_engine, first)
    await end(gateway_engine, second, TaskState.FAILED)

    third = await retry(gateway_engine, first)

    assert (await row_of(gateway_engine, third)).retry_of == second
    assert (await row_of(gateway_engine, first)).retried_as == second


async def test_of_many_retries_at_once_one_is_made(gateway_engine):
    task_id = await submitted(gateway_engine)
    await end(gateway_engine, task_id, TaskState.FAILED)

    outcomes = await asyncio.gather(*(retry(gateway_engine, task_id) for _ in range(20)), return_exceptions=True)

    made = [outcome for outcome in outcomes if isinstance(outcome, UUID)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, retries.AlreadyRetried)]
    assert (len(made), len(refused)) == (1, 19)


async def test_a_retry_sees_to_the_open_dead_letters_of_its_task(gateway_engine):
    task_id = await submitted(gateway_engine)
    await end(gateway_engine, task_id, TaskState.FAILED)
    letter = {"fingerprint": b"1", "task_id": task_id, "reason": "rejected", "queue": "greeter", "exchange": ""}
    async with gateway_engine.begin() as connection:
        await connection.execute(
            dead_letters.insert().values(**letter, routing_key="", headers={}, properties={}, body=b"")
        )

    new_id = await retry(gateway_engine, task_id)

    async with gateway_engine.connect() as connection:
        row = (await connection.execute(select(dead_letters))).one()
    assert (row.state, row.replay_task_id, row.resolved_at is not None) == ("replayed", new_id, True)


async def test_what_the_ledger_has_never_seen_can_be_submitted_again(gateway_engine):
    """A dead letter may be all that there is."""
    origin = Origin(type="greeter.person.greet", service="greeter", payload={"name": "Ada"})

    async with gateway_engine.begin() as connection:
        new = await retries.submit_again(connection, origin)

    row = await row_of(gateway_engine, new.id)
    assert (row.root_id, row.retry_of, row.state) == (new.id, None, "queued")


async def test_a_retry_of_a_root_lives_in_the_same_tree(gateway_engine):
    task_id = await submitted(gateway_engine)
    await end(gateway_engine, task_id, TaskState.FAILED)
    new_id = await retry(gateway_engine, task_id)

    async with gateway_engine.connect() as connection:
        unfinished = await ledger.count_unfinished(connection, task_id)
        found = (await connection.execute(select(tasks.c.id).where(tasks.c.root_id == task_id))).scalars().all()
    assert unfinished == 1
    assert set(found) == {task_id, new_id}


class TestOverHttp:
    async def _failed(self, api, **fields: Any) -> dict[str, Any]:
        view = await api.submit(**fields)
        await end(api.engine, UUID(view["id"]), TaskState.FAILED)
        return view

    async def test_a_retry_is_answered_with_the_new_task(self, api):
        view = await self._failed(api)

        response = await api.http.post(f"/v1/tasks/{view['id']}:retry")

        new = response.json()
        assert (response.status_code, response.headers["location"]) == (202, f"/v1/tasks/{new['id']}")
        assert (new["retry_of"], new["state"], new["payload"]) == (view["id"], "queued", {"name": "Ada"})
        assert (await api.http.get(f"/v1/tasks/{view['id']}")).json()["retried_as"] == new["id"]
        assert (await api.http.get(f"/v1/tasks/{new['id']}")).json() == new

    async def test_another_payload_is_held_against_the_contract(self, api):
        view = await self._failed(api)

        bad = await api.http.post(f"/v1/tasks/{view['id']}:retry", json={"payload": {"name": ""}})
        good = await api.http.post(f"/v1/tasks/{view['id']}:retry", json={"payload": {"name": "Grace"}})

        assert (bad.status_code, bad.json()["code"], bad.json()["errors"][0]["pointer"]) == (
            422,
            "contract_violation",
            "/payload/name",
        )
        assert good.json()["payload"] == {"name": "Grace"}

    async def test_a_listeners_payload_is_held_against_what_the_listener_announces(self, api):
        task_id = uuid4()
        told: dict[str, Any] = {"type": "billing.invoice.issued", "kind": TaskKind.EVENT, "event_id": uuid4()}
        await end(api.engine, task_id, TaskState.FAILED, payload={"n": 1}, **told)

        response = await api.http.post(f"/v1/tasks/{task_id}:retry")

        assert (response.status_code, response.json()["kind"], response.json()["payload"]) == (202, "event", {"n": 1})

    @pytest.mark.parametrize(
        ("state", "code"),
        [(None, "not_failed"), (TaskState.SUCCEEDED, "not_failed"), (TaskState.RUNNING, "not_failed")],
    )
    async def test_what_has_not_ended_badly_is_409(self, api, state, code):
        view = await api.submit()
        if state is not None:
            await end(api.engine, UUID(view["id"]), state)

        response = await api.http.post(f"/v1/tasks/{view['id']}:retry")

        assert (response.status_code, response.json()["code"]) == (409, code)

    async def test_a_second_retry_is_409_and_names_the_first(self, api):
        view = await self._failed(api)
        new = (await api.http.post(f"/v1/tasks/{view['id']}:retry")).json()

        response = await api.http.post(f"/v1/tasks/{view['id']}:retry")

        assert (response.status_code, response.json()["code"]) == (409, "already_retried")
        assert new["id"] in response.json()["detail"]

    async def test_a_payload_that_nobody_knows_is_409(self, api):
        task_id = uuid4()
        await end(api.engine, task_id, TaskState.FAILED)

        response = await api.http.post(f"/v1/tasks/{task_id}:retry")

        assert (response.status_code, response.json()["code"]) == (409, "payload_unknown")

    async def test_ten_requests_under_one_key_are_one_task_and_one_answer(self, api):
        view = await self._failed(api)
        url, headers = f"/v1/tasks/{view['id']}:retry", {"Idempotency-Key": "again"}

        answers = await asyncio.gather(*(api.http.post(url, headers=headers) for _ in range(10)))

        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.content for answer in answers}) == 1
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 9


async def test_a_key_that_may_only_write_reads_no_payload_by_trying_again(api):
    view = await api.submit()
    await end(api.engine, UUID(view["id"]), TaskState.FAILED)
    writer = {"Authorization": f"Bearer {await api.new_key(Scope.TASKS_WRITE)}"}

    answer = await api.http.post(f"/v1/tasks/{view['id']}:retry", headers=writer)
    cancelled = await api.http.post(f"/v1/tasks/{answer.json()['id']}:cancel", headers=writer)

    assert (answer.status_code, answer.json()["retry_of"], answer.json()["payload"]) == (202, view["id"], None)
    assert (cancelled.status_code, cancelled.json()["task"]["payload"]) == (200, None)
