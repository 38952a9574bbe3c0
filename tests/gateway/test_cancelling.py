"""A cancellation ends a task wherever it is, and says what it found."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import event, func, insert, select, update

from gateway import cancelling, ledger, retries
from gateway.models import manifests, task_events, tasks, unaccounted_tasks
from gateway.relaying import GatewayHooks
from gateway.scopes import Scope
from gateway.transactions import open_engine
from taskmesh import amqp, topology
from taskmesh.contracts.control import CONTROL, Cancellation
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState
from taskmesh.contracts.manifest import Manifest
from taskmesh.management import Management
from taskmesh.outbox import outbox
from taskmesh.relay import Relay


async def cancel(api, view: dict[str, Any], **request: Any) -> tuple[int, dict[str, Any]]:
    response = await api.http.post(f"/v1/tasks/{view['id']}:cancel", json=request)
    return response.status_code, response.json()


async def cancel_in_the_end(api, view: dict[str, Any]) -> dict[str, Any]:
    """As callers do, who come again when the gateway is too busy."""
    while True:
        status, answer = await cancel(api, view)
        if status != 503:
            return answer


async def happened(api, view: dict[str, Any], state: TaskState, **fields: Any) -> None:
    """What the worker says of the task."""
    values = {"at": datetime.now(UTC), "service": "greeter", "type": view["type"]} | fields
    async with api.engine.begin() as connection:
        await ledger.advance(connection, [LifecycleEvent(task_id=UUID(view["id"]), state=state, **values)])


async def leave(api) -> None:
    """All messages leave the gateway, as if the relay had published them."""
    async with api.engine.begin() as connection:
        await connection.execute(outbox.delete())


async def told(api) -> list[Cancellation]:
    """The control messages on their way to the service."""
    async with api.engine.connect() as connection:
        statement = select(outbox).where(outbox.c.routing_key == "greeter.control").order_by(outbox.c.id)
        rows = (await connection.execute(statement)).all()
    assert {row.exchange for row in rows} <= {"taskmesh.direct"}
    return [CONTROL.validate_json(bytes(row.body)) for row in rows]  # type: ignore[misc]


async def messages_of(api, view: dict[str, Any]) -> int:
    async with api.engine.connect() as connection:
        statement = select(func.count()).select_from(outbox).where(outbox.c.task_id == UUID(view["id"]))
        return (await connection.execute(statement)).scalar_one()


@pytest.mark.parametrize("delay", [{}, {"delay_seconds": 3600}], ids=["queued in the outbox", "scheduled"])
async def test_a_task_that_has_not_left_the_gateway_ends_here_and_now(api, delay):
    view = await api.submit(**delay)

    status, answer = await cancel(api, view, reason="a mistake")

    assert (status, answer["outcome"]) == (200, "cancelled")
    assert answer["detail"] == "The task has ended, and never began."
    assert (answer["task"]["state"], answer["task"]["cancel_reason"]) == ("cancelled", "a mistake")
    assert answer["task"]["finished_at"] is not None
    assert (await messages_of(api, view), await told(api)) == (0, [])


async def test_the_end_of_a_task_by_cancellation_is_in_its_timeline(api):
    view = await api.submit()
    await cancel(api, view)

    async with api.engine.connect() as connection:
        rows = await connection.execute(select(task_events.c.state).order_by(task_events.c.seq))
        assert list(rows.scalars()) == ["queued", "cancelled"]


async def test_whoever_waits_for_a_task_hears_of_its_cancellation_at_once(api):
    view = await api.submit(delay_seconds=3600)
    waiting = asyncio.create_task(api.http.get(f"/v1/tasks/{view['id']}", headers={"Prefer": "wait=20"}))

    await cancel(api, view)

    async with asyncio.timeout(10):
        assert (await waiting).json()["state"] == "cancelled"


async def test_of_a_task_that_has_left_its_service_is_told(api):
    view = await api.submit()
    await leave(api)

    status, answer = await cancel(api, view, reason="a mistake")

    assert (status, answer["outcome"], answer["task"]["state"]) == (202, "requested", "queued")
    assert answer["task"]["cancel_requested_at"] is not None
    (message,) = await told(api)
    assert (str(message.task_id), message.type, message.reason) == (view["id"], view["type"], "a mistake")
    assert (message.force, message.root_id) == (False, UUID(view["id"]))


@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.RETRYING])
async def test_what_runs_or_waits_to_be_retried_is_its_services(api, state):
    view = await api.submit()
    await leave(api)
    await happened(api, view, state)

    status, answer = await cancel(api, view)

    assert (status, answer["outcome"], answer["task"]["state"]) == (202, "requested", state)


async def test_a_message_that_the_relay_holds_is_left_to_it(api):
    view = await api.submit()
    async with api.engine.connect() as relay:
        await relay.execute(select(outbox.c.id).with_for_update())

        status, answer = await cancel(api, view)

        await relay.rollback()
    assert (status, answer["outcome"]) == (202, "requested")
    assert (await messages_of(api, view), len(await told(api))) == (1, 1)


async def test_of_a_message_that_a_killed_relay_may_have_published_its_service_is_told(api):
    """A relay that dies between publish and delete leaves the row behind, and perhaps a copy in the queue."""
    view = await api.submit()
    async with api.engine.connect() as relay:
        await relay.execute(select(outbox.c.id).with_for_update())
        await relay.rollback()

    status, answer = await cancel(api, view)

    assert (status, answer["outcome"]) == (202, "requested")
    assert (await messages_of(api, view), len(await told(api))) == (0, 1)


async def test_a_message_that_no_queue_takes_ends_here_and_now(api):
    view = await api.submit()
    async with api.engine.begin() as connection:
        await connection.execute(select(outbox.c.id).with_for_update())
        await connection.execute(update(outbox).values(failures=3, last_error="312 NO_ROUTE"))

    _, answer = await cancel(api, view)

    assert answer["outcome"] == "cancelled"


async def test_of_a_task_that_was_sent_again_its_service_is_told(api):
    """An audit missed its message, which may turn up."""
    view = await api.submit()
    async with api.engine.begin() as connection:
        row = {"task_id": UUID(view["id"]), "service": "greeter", "type": view["type"], "redrives": 1, "mark": ""}
        await connection.execute(insert(unaccounted_tasks).values(**row))

    _, answer = await cancel(api, view)

    assert answer["outcome"] == "requested"


async def test_what_has_ended_is_not_changed(api):
    view = await api.submit()
    await happened(api, view, TaskState.SUCCEEDED, result=1)

    status, answer = await cancel(api, view)

    assert (status, answer["outcome"], answer["task"]["state"]) == (200, "already_finished", "succeeded")
    assert answer["task"]["cancel_requested_at"] is None


async def test_a_repeated_request_tells_its_service_once(api):
    view = await api.submit()
    await leave(api)

    answers = [await cancel(api, view, reason=reason) for reason in ("first", "second", "third")]

    assert [status for status, _ in answers] == [202, 202, 202]
    assert {answer["task"]["cancel_requested_at"] for _, answer in answers} == {
        answers[0][1]["task"]["cancel_requested_at"]
    }
    assert [message.reason for message in await told(api)] == ["first"]


async def test_twenty_requests_at_once_tell_its_service_once(api):
    view = await api.submit()
    await leave(api)

    answers = await asyncio.gather(*(cancel(api, view) for _ in range(20)))

    assert {status for status, _ in answers} == {202}
    assert len(await told(api)) == 1


async def test_force_is_added_by_a_later_request(api):
    await api.announce(await _forceable(api))
    view = await api.submit()
    await leave(api)
    await cancel(api, view, reason="first")

    status, _ = await cancel(api, view, force=True)

    assert status == 202
    assert [(message.force, message.reason) for message in await told(api)] == [(False, "first"), (True, "first")]


async def _forceable(api) -> Manifest:
    """What the greeter announces, with the leave to kill."""
    async with api.engine.connect() as connection:
        announced = (await connection.execute(select(manifests.c.manifest))).scalar_one()
    types = [{**one, "force_cancel": True} for one in announced["types"]]
    return Manifest.model_validate({**announced, "types": types, "announced_at": datetime.now(UTC)})


async def test_force_is_refused_where_the_type_does_not_allow_it(api):
    view = await api.submit()
    await leave(api)

    status, answer = await cancel(api, view, force=True)

    assert (status, answer["code"]) == (409, "force_not_allowed")
    async with api.engine.connect() as connection:
        assert (await connection.execute(select(tasks.c.cancel_requested_at))).scalar_one() is None


async def test_a_task_that_nobody_knows_is_404(api):
    response = await api.http.post(f"/v1/tasks/{uuid4()}:cancel")

    assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_a_request_may_have_no_body(api):
    view = await api.submit()

    response = await api.http.post(f"/v1/tasks/{view['id']}:cancel")

    assert (response.status_code, response.json()["outcome"]) == (200, "cancelled")


async def test_cancelling_needs_the_right_to_write_tasks(api):
    view = await api.submit()
    key = await api.new_key(Scope.TASKS_READ)

    response = await api.http.post(f"/v1/tasks/{view['id']}:cancel", headers={"Authorization": f"Bearer {key}"})

    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize(("end", "outcome"), [(TaskState.CANCELLED, "cancelled"), (TaskState.SUCCEEDED, "too_late")])
async def test_whoever_waits_is_told_what_became_of_it(api, eventually, end, outcome):
    view = await api.submit()
    await leave(api)
    await happened(api, view, TaskState.RUNNING)
    url = f"/v1/tasks/{view['id']}:cancel"
    asked = asyncio.create_task(api.http.post(url, headers={"Prefer": "wait=20"}))
    await eventually(lambda: _is_told(api))

    await happened(api, view, end)

    answer = await asked
    assert (answer.status_code, answer.json()["outcome"]) == (200, outcome)
    assert answer.headers["preference-applied"] == "wait=20"


async def _is_told(api) -> bool:
    return bool(await told(api))


async def test_a_cancelled_task_can_be_tried_again(api):
    view = await api.submit()
    await cancel(api, view)

    response = await api.http.post(f"/v1/tasks/{view['id']}:retry")

    assert (response.status_code, response.json()["retry_of"]) == (202, view["id"])


async def test_a_retry_of_a_cancelled_task_is_not_cancelled(api):
    view = await api.submit()
    await cancel(api, view)

    async with api.engine.begin() as connection:
        new = await retries.retry(connection, UUID(view["id"]))
    async with api.engine.connect() as connection:
        assert (await ledger.get_task(connection, new.id)).cancel_requested_at is None


async def test_fifty_cancellations_race_with_the_relay_and_no_task_is_lost(api, broker, gateway_url, eventually):
    """Each task is either ended here, without a message, or its message is published and its service is told."""
    with Management(broker.management_url) as management:
        topology.declare(topology.worker_topology("greeter", []), amqp_url=broker.amqp_url, management=management)
    views = [await api.submit() for _ in range(50)]

    async with _relaying(gateway_url, broker.amqp_url):
        answers = await asyncio.gather(*(cancel_in_the_end(api, view) for view in views))
        await eventually(lambda: _is_empty(api))

    outcomes = Counter(answer["outcome"] for answer in answers)
    published, control = await _drain(broker.amqp_url, "greeter"), await _drain(broker.amqp_url, "greeter.control")
    assert outcomes["cancelled"] + outcomes["requested"] == 50
    # What ended here was not published; of everything else its service has the word.
    ended = {view["id"] for view, answer in zip(views, answers, strict=True) if answer["outcome"] == "cancelled"}
    assert not ended & set(published)
    assert set(control) == {view["id"] for view in views} - ended


@contextlib.asynccontextmanager
async def _relaying(url: str, amqp_url: str) -> AsyncIterator[None]:
    engine, stop = open_engine(SecretStr(url), pool_size=2, wait_seconds=5, role="relay"), asyncio.Event()
    running = asyncio.create_task(Relay(engine, amqp_url, "gateway", hooks=GatewayHooks(), batch_size=5).run(stop))
    try:
        yield
    finally:
        stop.set()
        await running
        await engine.dispose()


async def _is_empty(api) -> bool:
    async with api.engine.connect() as connection:
        return not (await connection.execute(select(func.count()).select_from(outbox))).scalar_one()


async def _drain(amqp_url: str, queue: str) -> list[str]:
    """The task ids of all messages in a queue."""

    def read() -> list[str]:
        import pika

        connection = pika.BlockingConnection(amqp.parameters(amqp_url, name="test"))
        channel, found = connection.channel(), []
        while True:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
            if method is None:
                connection.close()
                return found
            is_control = queue.endswith(".control")
            found.append(str(CONTROL.validate_json(body).task_id) if is_control else properties.headers["id"])  # type: ignore[union-attr]

    return await asyncio.to_thread(read)


async def test_a_key_that_may_only_write_reads_no_payload_by_cancelling_what_has_ended(api):
    view = await api.submit(payload={"name": "Confidential"})
    await happened(api, view, TaskState.SUCCEEDED, result={"secret": 1})
    writer = {"Authorization": f"Bearer {await api.new_key(Scope.TASKS_WRITE)}"}

    answer = await api.http.post(f"/v1/tasks/{view['id']}:cancel", headers=writer)
    own = await api.http.post(f"/v1/tasks/{view['id']}:cancel")

    assert (answer.status_code, answer.json()["outcome"]) == (200, "already_finished")
    assert (answer.json()["task"]["payload"], answer.json()["task"]["result"]) == (None, None)
    assert own.json()["task"]["payload"] == {"name": "Confidential"}


async def test_a_message_that_is_claimed_and_freed_before_it_is_taken_may_have_left(api, gateway_url):
    """A relay publishes and dies while the request stands still between its look at the outbox and its lock."""
    view = await api.submit()
    relays: list[str] = []

    @event.listens_for(api.engine.sync_engine, "after_cursor_execute")
    def publish_and_die(_connection, _cursor, statement, *_):
        if "outbox" not in statement or relays:
            return
        relays.append(statement)
        with psycopg.connect(gateway_url) as relay:
            relay.execute("select id from outbox for update")
            relay.rollback()

    async with api.engine.begin() as connection:
        outcome, _ = await cancelling.cancel(connection, UUID(view["id"]), cancelling.Wish())

    assert (outcome, len(relays)) == (cancelling.CancelOutcome.REQUESTED, 1)
