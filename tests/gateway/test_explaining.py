"""Why is it not done? Each reason, found from rows as they are in a gateway's database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select, update

from gateway import explaining, ledger, observations
from gateway.explaining import Reason
from gateway.models import (
    dead_letters,
    manifests,
    services,
    sightings,
    unaccounted_tasks,
)
from gateway.observations import QueueFacts
from gateway.scopes import Scope
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskState
from taskmesh.contracts.manifest import Manifest
from taskmesh.outbox import outbox

LONG_AGO = timedelta(minutes=10)


async def explain(api, view: dict[str, Any]) -> dict[str, Any]:
    response = await api.http.get(f"/v1/tasks/{view['id']}:explain")
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def run(api, *statements: Any) -> None:
    async with api.engine.begin() as connection:
        for statement in statements:
            await connection.execute(statement)


async def submitted(api, **fields: Any) -> dict[str, Any]:
    """A task whose message has left the gateway."""
    view: dict[str, Any] = await api.submit(**fields)
    await run(api, outbox.delete())
    return view


async def happened(api, view: dict[str, Any], state: TaskState, **fields: Any) -> None:
    values = {"at": datetime.now(UTC), "service": "greeter", "type": view["type"]} | fields
    async with api.engine.begin() as connection:
        await ledger.advance(connection, [LifecycleEvent(task_id=UUID(view["id"]), state=state, **values)])


async def looked(
    api, *, ready: int = 0, held: int = 0, consumers: int = 0, ago: timedelta = timedelta(0), queue: str = "greeter"
) -> None:
    """The reconciler has looked at a queue."""
    seen = QueueFacts(
        queue=queue,
        service="greeter",
        ready=ready,
        unacknowledged=held,
        consumers=consumers,
        observed_at=datetime.now(UTC) - ago,
    )
    async with api.engine.begin() as connection:
        await observations.store_queues(connection, [seen])


async def broker(api, *, reachable: bool, ago: timedelta = timedelta(0)) -> None:
    async with api.engine.begin() as connection:
        await observations.store_broker(connection, reachable=reachable, at=datetime.now(UTC) - ago, error="refused")


async def seen(api, view: dict[str, Any], *, ago: timedelta = timedelta(0), **fields: Any) -> None:
    """The service has said what it knows of the task."""
    row = {"task_id": UUID(view["id"]), "service": "greeter", "inquiry_id": uuid4(), "seen_at": datetime.now(UTC) - ago}
    await run(api, insert(sightings).values(**row, **fields))


def test_every_reason_has_a_rule():
    written = set(explaining.Reason)

    assert len(written) == 15
    assert explaining.RULES[-1] is explaining.queued


async def test_finished(api):
    view = await submitted(api)
    await happened(api, view, TaskState.FAILED, failure=TaskFailure(code="rejected", message="no such invoice"))

    answer = await explain(api, view)

    assert (answer["reason"], answer["state"]) == (Reason.FINISHED, "failed")
    assert answer["summary"] == "It has ended, failed: rejected: no such invoice."
    assert "Retry" in answer["advice"]


async def test_scheduled(api):
    view = await api.submit(delay_seconds=3600)

    answer = await explain(api, view)

    assert (answer["reason"], answer["next_at"]) == (Reason.SCHEDULED, view["due_at"])


async def test_scheduled_by_a_worker_service(api):
    """Its message waits in the service's own outbox."""
    view, due_at = {"id": str(uuid4()), "type": "greeter.person.greet"}, datetime.now(UTC) + LONG_AGO
    await happened(api, view, TaskState.SCHEDULED, due_at=due_at)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.SCHEDULED
    assert datetime.fromisoformat(answer["next_at"]) == due_at


async def test_relay_behind(api):
    first, view = await api.submit(), await api.submit()
    due_at = datetime.now(UTC) - timedelta(seconds=40)
    await run(api, update(outbox).where(outbox.c.task_id == UUID(first["id"])).values(due_at=due_at))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.RELAY_BEHIND
    assert answer["summary"] == "It has not left the gateway: the relay is 40 s behind; messages before it: 1."
    assert (answer["facts"]["message"]["ahead"], round(answer["facts"]["message"]["behind"])) == (1, 40)


async def test_a_services_relay_behind(api):
    view = await submitted(api)
    await happened(api, view, TaskState.RETRYING, due_at=datetime.now(UTC) - LONG_AGO)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.RELAY_BEHIND
    assert "has not left greeter" in answer["summary"]


async def test_unroutable(api):
    view = await api.submit()
    await run(api, update(outbox).values(failures=3, last_error="312 NO_ROUTE"))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.UNROUTABLE
    assert answer["summary"] == "Its message was given back 3 times: no queue takes it."
    assert answer["next_at"] is not None


@pytest.mark.parametrize("left", [False, True])
async def test_broker_unreachable(api, left):
    view = await (submitted(api) if left else api.submit())
    await broker(api, reachable=True, ago=timedelta(minutes=20))
    await broker(api, reachable=False, ago=timedelta(seconds=10))
    await broker(api, reachable=False)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.BROKER_UNREACHABLE
    assert answer["summary"] == "The broker has not answered for 10 s."


async def test_no_worker_announces_the_type(api):
    view = await submitted(api)
    await run(api, manifests.delete())

    answer = await explain(api, view)

    assert (answer["reason"], answer["facts"]["announcement"]) == (
        Reason.NO_WORKER_ANNOUNCES_TYPE,
        {"service": "greeter", "type_announced": False},
    )


async def test_the_service_announces_itself_without_the_type(api):
    view = await submitted(api)
    await api.announce(Manifest(service="greeter", release="2", types=(), announced_at=datetime.now(UTC)))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.NO_WORKER_ANNOUNCES_TYPE
    assert answer["summary"] == "greeter announces itself, but not greeter.person.greet."


async def test_no_consumers(api):
    view = await submitted(api)
    await looked(api, ready=7)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.NO_CONSUMERS
    assert answer["summary"] == "No worker takes from greeter, where 7 messages wait."


async def test_paused(api):
    view = await submitted(api)
    await looked(api, ready=7)
    await run(api, insert(services).values(service="greeter", paused_at=datetime.now(UTC), pause_reason="migration"))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.PAUSED
    assert answer["summary"] == "greeter was paused 0 s ago: migration."


async def test_queued(api):
    view = await submitted(api)
    await looked(api, ready=7, held=4, consumers=2)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.QUEUED
    assert "7 wait there, 4 are held by 2 consumers" in answer["summary"]
    assert answer["facts"]["queue"]["stale"] is False


async def test_queued_and_just_on_its_way(api):
    view = await api.submit()

    assert (await explain(api, view))["reason"] == Reason.QUEUED


async def test_queued_in_a_service_that_has_not_announced_itself_lately(api):
    view = await submitted(api)
    await run(api, update(manifests).values(announced_at=datetime.now(UTC) - LONG_AGO))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.QUEUED
    assert "it has not announced itself for 10 min" in answer["summary"]


async def test_a_listeners_task_waits_in_the_queue_of_events(api):
    view = {"id": str(uuid4()), "type": "billing.invoice.issued"}
    await happened(api, view, TaskState.QUEUED, kind="event", event_id=uuid4())
    await looked(api, queue="greeter.events", ready=1)

    answer = await explain(api, view)

    assert (answer["reason"], answer["facts"]["queue"]["queue"]) == (Reason.NO_CONSUMERS, "greeter.events")


async def test_running(api):
    view = await submitted(api)
    await happened(api, view, TaskState.RUNNING, worker="host:7")

    answer = await explain(api, view)

    assert (answer["reason"], answer["summary"]) == (Reason.RUNNING, "It runs for 0 s on host:7.")


async def test_running_for_longer_than_it_may(api):
    view = await submitted(api)
    await happened(api, view, TaskState.RUNNING, at=datetime.now(UTC) - LONG_AGO, worker="host:7")
    async with api.engine.begin() as connection:
        announced = (await connection.execute(select(manifests.c.manifest))).scalar_one()
        types = [{**one, "time_limit_seconds": 300} for one in announced["types"]]
        await connection.execute(update(manifests).values(manifest={**announced, "types": types}))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.RUNNING
    assert "longer than its limit of 300 s" in answer["summary"]


async def test_running_as_its_service_says_although_no_report_has_come(api):
    view = await submitted(api)
    await seen(api, view, state="running", alive=True, worker="host:7")

    assert (await explain(api, view))["reason"] == Reason.RUNNING


async def test_worker_lost_as_its_service_says(api):
    view = await submitted(api)
    await happened(api, view, TaskState.RUNNING)
    await seen(api, view, state="running", alive=False, worker="host:7")

    answer = await explain(api, view)

    assert answer["reason"] == Reason.WORKER_LOST
    assert "host:7" in answer["summary"]


async def test_worker_lost_as_was_reported(api):
    view = await submitted(api)
    at = datetime.now(UTC) - timedelta(seconds=50)
    await happened(api, view, TaskState.RUNNING, at=at, worker="host:7")
    lost = TaskFailure(code="worker_lost", message="killed")
    await happened(api, view, TaskState.QUEUED, at=at + timedelta(seconds=10), failure=lost)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.WORKER_LOST
    assert answer["summary"] == "The process that ran it (host:7) was lost 40 s ago; it is delivered again."


async def test_retry_due(api):
    view, due_at = await submitted(api), datetime.now(UTC) + timedelta(minutes=1)
    failure = TaskFailure(code="unavailable", message="no relay")
    await happened(api, view, TaskState.RETRYING, attempt=2, due_at=due_at, failure=failure)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.RETRY_DUE
    assert "Attempt 2 of 3 failed (unavailable: no relay)" in answer["summary"]
    assert datetime.fromisoformat(answer["next_at"]) == due_at


async def test_cancel_requested(api):
    view = await submitted(api)
    await api.http.post(f"/v1/tasks/{view['id']}:cancel", json={"reason": "a mistake"})

    answer = await explain(api, view)

    assert answer["reason"] == Reason.CANCEL_REQUESTED
    assert answer["facts"]["cancellation"]["cancel_reason"] == "a mistake"


async def test_cancel_requested_while_nobody_takes_control_messages(api):
    view = await submitted(api)
    await api.http.post(f"/v1/tasks/{view['id']}:cancel")
    await looked(api, queue="greeter.control", ready=1)

    answer = await explain(api, view)

    assert answer["reason"] == Reason.CANCEL_REQUESTED
    assert answer["advice"] == "Start the relay of greeter: it takes them."


@pytest.mark.parametrize("state", [None, TaskState.FAILED])
async def test_dead_letter(api, state):
    view = await submitted(api)
    if state is not None:
        await happened(api, view, state, failure=TaskFailure(code="rejected", message="no"))
    letter = {"task_id": UUID(view["id"]), "fingerprint": b"1", "reason": "rejected", "queue": "greeter"}
    rest: dict[str, Any] = {"exchange": "", "routing_key": "", "headers": {}, "properties": {}, "body": b""}
    await run(api, insert(dead_letters).values(**letter, **rest, code="unknown_task", error="no such task"))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.DEAD_LETTER
    assert answer["summary"] == "Its message was given up in greeter (unknown_task): no such task."


async def test_unaccounted(api):
    view = await submitted(api)
    since = datetime.now(UTC) - LONG_AGO
    row = {"task_id": UUID(view["id"]), "service": "greeter", "type": view["type"], "mark": "", "since": since}
    await run(api, insert(unaccounted_tasks).values(**row, confirmed_at=since))

    answer = await explain(api, view)

    assert answer["reason"] == Reason.UNACCOUNTED
    assert "since 10 min" in answer["summary"]


@pytest.mark.parametrize("what", ["queue", "broker", "sighting"])
async def test_what_was_seen_long_ago_is_shown_and_proves_nothing(api, what):
    view = await submitted(api)
    match what:
        case "queue":
            await looked(api, ready=1, ago=LONG_AGO)
        case "broker":
            await broker(api, reachable=False, ago=LONG_AGO)
        case _:
            await seen(api, view, ago=LONG_AGO, state="running", alive=False)

    answer = await explain(api, view)

    assert (answer["reason"], answer["facts"][what]["stale"]) == (Reason.QUEUED, True)


async def test_a_task_that_nobody_knows_is_404(api):
    response = await api.http.get(f"/v1/tasks/{uuid4()}:explain")

    assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_explaining_needs_the_right_to_read_tasks(api):
    view = await api.submit()
    key = await api.new_key(Scope.TYPES_READ)

    response = await api.http.get(f"/v1/tasks/{view['id']}:explain", headers={"Authorization": f"Bearer {key}"})

    assert response.status_code == 403


async def test_a_task_that_was_begun_again_since_its_worker_was_missed_runs(api):
    view = await submitted(api)
    await seen(api, view, ago=timedelta(seconds=5), state="running", alive=False, worker="host:7")
    await happened(api, view, TaskState.RUNNING, attempt=2, worker="host:8")

    answer = await explain(api, view)

    assert answer["reason"] == Reason.RUNNING
    assert "host:8" in answer["summary"]
