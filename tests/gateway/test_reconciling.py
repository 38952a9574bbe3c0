"""The audit accounts for every task, names those that it cannot, and takes its time before it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, select, text, update

from gateway import candidates, ledger, observations, sightings, tallies, unaccounted
from gateway.models import dead_letters, tasks
from gateway.new_tasks import NewTask
from gateway.observations import QueueFacts
from gateway.reconciling import Reconciler
from taskmesh import celery_protocol
from taskmesh.contracts.control import CONTROL, Inquiry, Sighting, Sightings
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.outbox import outbox
from taskmesh.topology import DEAD_QUEUE

TYPE = "greeter.person.greet"
LAG = timedelta(seconds=10)
GRACE = timedelta(0)


class Scene:
    """A gateway's database, a broker of which only the figures exist, and services that answer as they are told."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.queues: dict[str, int] = {"greeter": 0, "greeter.events": 0}
        self.hears = True
        self.knows: dict[UUID, dict[str, Any]] = {}
        self.reachable = True
        self._answered = asyncio.Event()
        self.reconciler = Reconciler(engine, answered=self._answered, answer_seconds=2)

    async def accept(self, count: int = 1, *, published: bool = True, **fields: Any) -> list[UUID]:
        """Accept tasks; their messages leave the outbox at once unless told otherwise."""
        new = [
            NewTask(**{"type": TYPE, "service": "greeter", "payload": {"name": "Ada"}, **fields}) for _ in range(count)
        ]
        async with self.engine.begin() as connection:
            await ledger.submit(connection, new)
            if published:
                await connection.execute(delete(outbox))
        return [task.id for task in new]

    async def hear(self, *events: LifecycleEvent) -> None:
        async with self.engine.begin() as connection:
            await ledger.advance(connection, events)

    async def observe(self) -> None:
        """Look at the broker, as many seconds later as figures need to be believed."""
        consumers = 1 if self.hears else 0
        async with self.engine.begin() as connection:
            await connection.execute(text("update unaccounted_tasks set since = since - interval '11 seconds'"))
            now = datetime.now(UTC)
            facts = [
                QueueFacts(queue=name, service="greeter", ready=ready, unacknowledged=0, consumers=1, observed_at=now)
                for name, ready in self.queues.items()
            ]
            for name in ("greeter", "sender"):
                control = f"{name}.control"
                facts.append(
                    QueueFacts(
                        queue=control, service=name, ready=0, unacknowledged=0, consumers=consumers, observed_at=now
                    )
                )
            await observations.store_queues(connection, facts)
            await observations.store_broker(connection, reachable=self.reachable, at=now)

    async def audit(self):
        await self.observe()
        async with self._services():
            return await self.reconciler.audit(grace=GRACE)

    async def named(self) -> list[UUID]:
        async with self.engine.connect() as connection:
            return [record.task_id for record in await unaccounted.named(connection, limit=1000)]

    async def outbox(self) -> list[Any]:
        async with self.engine.connect() as connection:
            rows = await connection.execute(select(outbox).where(outbox.c.task_id.is_not(None)))
            return list(rows)

    async def task(self, task_id: UUID) -> Any:
        async with self.engine.connect() as connection:
            return await ledger.get_task(connection, task_id)

    @asynccontextmanager
    async def _services(self) -> AsyncIterator[None]:
        answering = asyncio.create_task(self._answer())
        try:
            yield
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _answer(self) -> None:
        while True:
            control = outbox.c.routing_key.like("%.control")
            async with self.engine.begin() as connection:
                rows = (await connection.execute(delete(outbox).where(control).returning(outbox))).all()
                for row in rows:
                    inquiry = CONTROL.validate_json(row.body)
                    assert isinstance(inquiry, Inquiry)
                    service = row.routing_key.removesuffix(".control")
                    said = [self._sighting(task_id, service) for task_id in inquiry.task_ids]
                    answer = Sightings(
                        inquiry_id=inquiry.inquiry_id, service=service, at=datetime.now(UTC), items=tuple(said)
                    )
                    await sightings.store(connection, [answer])
            if rows:
                self._answered.set()
            await asyncio.sleep(0.01)

    def _sighting(self, task_id: UUID, service: str) -> Sighting:
        known = self.knows.get(task_id, {})
        if known.get("by", "greeter") != service:
            known = {}
        fields = {name: value for name, value in known.items() if name != "by"}
        return Sighting(**{"task_id": task_id, "state": "unknown", **fields})


@pytest.fixture
def scene(gateway_engine) -> Scene:
    return Scene(gateway_engine)


def balance(audit) -> tuple[int, ...]:
    return (audit.waiting, audit.running, audit.finished, audit.dead, audit.unaccounted)


async def test_tasks_of_a_queue_that_was_purged_are_named_by_the_second_audit(scene):
    lost = await scene.accept(20)

    first = await scene.audit()
    assert await scene.named() == []
    second = await scene.audit()

    assert sorted(await scene.named()) == sorted(lost)
    assert (first.detail["suspected"], first.unaccounted) == (20, 0)
    assert (second.accepted, balance(second)) == (20, (0, 0, 0, 0, 20))


async def test_two_audits_without_an_observation_between_them_name_nobody(scene):
    await scene.accept()
    await scene.audit()

    async with scene._services():
        await scene.reconciler.audit(grace=GRACE)

    assert await scene.named() == []


async def test_a_task_that_is_named_is_sent_again_as_the_same_attempt(scene):
    [task_id] = await scene.accept(tags=["a"], priority=3)
    scene.knows[task_id] = {"state": "waiting", "sequence": 1, "starts": 2}
    await scene.audit()

    audit = await scene.audit()

    [row] = await scene.outbox()
    message = celery_protocol.decode(row.headers, {**row.properties}, row.body)
    assert audit.redriven == 1
    assert (message.id, message.type, message.payload) == (task_id, TYPE, {"name": "Ada"})
    assert (message.sequence, message.priority, row.exchange) == (2, 3, "taskmesh.commands")


async def test_a_task_that_was_sent_again_is_accounted_for(scene):
    [task_id] = await scene.accept()
    await scene.audit()
    await scene.audit()

    third = await scene.audit()

    assert await scene.named() == []
    assert (third.unaccounted, third.redriven, len(await scene.outbox())) == (0, 0, 1)
    assert (await scene.task(task_id)).state == "queued"


async def test_a_task_that_is_lost_again_is_sent_again_after_a_pause_only(scene):
    await scene.accept()
    await scene.audit()
    await scene.audit()
    async with scene.engine.begin() as connection:
        await connection.execute(delete(outbox))
    await scene.audit()
    soon = await scene.audit()
    async with scene.engine.begin() as connection:
        await connection.execute(text("update unaccounted_tasks set redriven_at = redriven_at - interval '1 minute'"))

    later = await scene.audit()

    assert (soon.unaccounted, soon.redriven, later.redriven) == (1, 0, 1)


async def test_a_task_without_a_payload_is_named_only(scene):
    [task_id] = await scene.accept()
    async with scene.engine.begin() as connection:
        await connection.execute(update(tasks).values(payload=None))
    await scene.audit()

    audit = await scene.audit()

    assert (await scene.named(), audit.redriven) == ([task_id], 0)


async def test_no_more_than_a_hundred_are_sent_again_at_once(scene):
    await scene.accept(120)
    await scene.audit()

    audits = [await scene.audit(), await scene.audit()]

    assert [audit.redriven for audit in audits] == [100, 20]


async def test_nothing_is_sent_again_where_that_is_turned_off(scene):
    await scene.accept()
    scene.reconciler._redrive = False
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.redriven) == (1, 0)


@pytest.mark.parametrize(
    "known",
    [
        {"state": "outbox", "sequence": 0, "due_at": datetime.now(UTC)},
        {"state": "running", "sequence": -1, "alive": True, "started_at": datetime.now(UTC) - timedelta(hours=3)},
    ],
    ids=["a retry waits in the service's outbox", "it has been running for hours"],
)
async def test_a_task_that_its_service_has_is_accounted_for(scene, known):
    [task_id] = await scene.accept()
    scene.knows[task_id] = known
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.detail["suspected"]) == (0, 0)


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"state": "waiting", "sequence": 0, "starts": 1},
        {"state": "running", "sequence": -1, "starts": 1, "alive": False},
    ],
    ids=["never begun", "between two attempts", "its worker was killed"],
)
async def test_a_task_whose_message_may_be_in_the_queue_is_accounted_for(scene, known):
    [task_id] = await scene.accept()
    scene.knows[task_id] = known
    scene.queues["greeter"] = 1
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.detail["suspected"]) == (0, 0)


@pytest.mark.parametrize("lost", ["waiting", "running"])
async def test_a_task_whose_next_attempt_is_nowhere_is_named(scene, lost):
    [task_id] = await scene.accept()
    scene.knows[task_id] = {"state": lost, "sequence": 0, "starts": 1, "alive": False}
    await scene.audit()
    await scene.audit()
    assert await scene.named() == [task_id]


async def test_a_suspect_that_begins_another_attempt_is_a_new_suspect(scene):
    [task_id] = await scene.accept()
    scene.knows[task_id] = {"state": "waiting", "sequence": 0, "starts": 1}
    await scene.audit()
    scene.knows[task_id] = {"state": "waiting", "sequence": 1, "starts": 2}

    audit = await scene.audit()

    assert (await scene.named(), audit.detail["suspected"]) == ([], 1)


async def test_a_queue_with_fewer_messages_than_tasks_misses_the_difference(scene):
    await scene.accept(5)
    scene.queues["greeter"] = 3
    first = await scene.audit()

    second = await scene.audit()

    assert (first.unaccounted, second.unaccounted, second.waiting, await scene.named()) == (0, 2, 3, [])
    assert second.detail["gaps"] == [{"queue": "greeter", "presumed": 5, "messages": 3, "missing": 2}]


async def test_a_scheduled_task_is_accounted_for(scene):
    await scene.accept(published=False, due_at=datetime.now(UTC) + timedelta(hours=1))
    await scene.audit()

    audit = await scene.audit()

    assert balance(audit) == (1, 0, 0, 0, 0)


async def test_a_task_that_waits_in_the_outbox_of_its_sender_is_accounted_for(scene):
    parent, child = uuid4(), uuid4()
    told = {"at": datetime.now(UTC), "root_id": parent}
    await scene.hear(
        LifecycleEvent(task_id=parent, type="sender.order.place", service="sender", state=TaskState.SUCCEEDED, **told),
        LifecycleEvent(task_id=child, type=TYPE, service="greeter", state=TaskState.QUEUED, parent_id=parent, **told),
    )
    scene.knows[child] = {"by": "sender", "state": "outbox"}
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.detail["suspected"]) == (0, 0)


async def test_a_listener_whose_event_waits_in_the_outbox_of_its_sender_is_accounted_for(scene):
    event_id = uuid4()
    await scene.hear(
        LifecycleEvent(
            task_id=celery_protocol.listener_task_id(event_id, "greeter"),
            type="sender.order.placed",
            kind=TaskKind.EVENT,
            event_id=event_id,
            service="greeter",
            state=TaskState.QUEUED,
            at=datetime.now(UTC),
        )
    )
    scene.knows[event_id] = {"by": "sender", "state": "outbox"}
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.detail["suspected"]) == (0, 0)


async def test_a_listener_whose_event_is_nowhere_is_named(scene):
    event_id = uuid4()
    task_id = celery_protocol.listener_task_id(event_id, "greeter")
    await scene.hear(
        LifecycleEvent(
            task_id=task_id,
            type="sender.order.placed",
            kind=TaskKind.EVENT,
            event_id=event_id,
            service="greeter",
            state=TaskState.QUEUED,
            at=datetime.now(UTC),
        )
    )
    await scene.audit()
    await scene.audit()
    assert await scene.named() == [task_id]


@pytest.mark.parametrize("state", [TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED])
async def test_a_task_that_has_ended_and_whose_report_was_lost_is_mended(scene, state):
    [task_id] = await scene.accept()
    scene.knows[task_id] = {"state": state.value, "sequence": 0, "starts": 1, "worker": "host:1"}
    first = await scene.audit()

    second = await scene.audit()

    task = await scene.task(task_id)
    assert (first.detail["mended"], second.detail["mended"]) == (0, 1)
    assert (task.state, task.result, (task.error or {}).get("code")) == (
        state,
        None,
        "outcome_lost" if state is TaskState.FAILED else None,
    )
    assert balance(second) == (0, 0, 1, 0, 0)


@pytest.mark.parametrize("state", [TaskState.SUCCEEDED, TaskState.FAILED])
async def test_a_report_that_seemed_to_be_lost_and_comes_after_all_tells_the_rest(scene, state):
    [task_id] = await scene.accept()
    scene.knows[task_id] = {"state": state.value, "sequence": 0, "starts": 1}
    await scene.audit()
    await scene.audit()
    failed = state is TaskState.FAILED
    told = {"result": None, "failure": TaskFailure(code="exception", message="no")} if failed else {"result": {"a": 1}}

    report = {"task_id": task_id, "type": TYPE, "service": "greeter", "state": state, "at": datetime.now(UTC)}
    await scene.hear(LifecycleEvent(**report, **told))

    task = await scene.task(task_id)
    assert (task.state, task.result) == (state, told["result"])
    assert (task.error or {}).get("code") == ("exception" if failed else None)


async def test_while_the_broker_is_away_nobody_is_suspected(scene):
    await scene.accept(3)
    scene.reachable = False
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.waiting, audit.detail["unknown"]) == (0, 3, {"broker_unreachable": 3})


async def test_while_a_service_does_not_hear_nobody_is_suspected(scene):
    await scene.accept(3)
    scene.hears = False
    await scene.audit()

    audit = await scene.audit()

    assert (audit.unaccounted, audit.waiting, audit.detail["unknown"]) == (0, 3, {"service_silent": 3})


async def test_a_named_task_stays_named_while_nothing_can_be_said(scene):
    [task_id] = await scene.accept()
    scene.reconciler._redrive = False
    await scene.audit()
    await scene.audit()
    scene.reachable = False

    audit = await scene.audit()

    assert (await scene.named(), audit.unaccounted) == ([task_id], 1)


async def test_a_task_with_an_open_dead_letter_is_dead(scene):
    [task_id] = await scene.accept()
    async with scene.engine.begin() as connection:
        await connection.execute(
            dead_letters.insert().values(
                fingerprint=b"1",
                task_id=task_id,
                reason="rejected",
                queue="greeter",
                exchange="",
                routing_key="",
                headers={},
                properties={},
                body=b"",
            )
        )
    await scene.audit()

    audit = await scene.audit()

    assert balance(audit) == (0, 0, 0, 1, 0)


async def test_a_task_with_newer_news_is_not_examined(scene):
    await scene.accept()
    await scene.observe()

    audit = await scene.reconciler.audit(grace=timedelta(minutes=1))

    assert (audit.detail["examined"], audit.waiting) == (0, 1)


async def test_an_audit_with_too_many_tasks_goes_on_in_the_next(scene, monkeypatch):
    monkeypatch.setattr("gateway.reconciling.MOST_EXAMINED", 2)
    monkeypatch.setattr("gateway.candidates.PAGE", 2)
    scene.queues["greeter"] = 5
    await scene.accept(5)

    audits = [await scene.audit() for _ in range(4)]

    assert [audit.detail["examined"] for audit in audits] == [2, 2, 1, 2]
    assert not audits[1].detail["complete"]


async def test_who_was_named_is_forgotten_once_it_has_ended(scene):
    [task_id] = await scene.accept()
    await scene.audit()
    await scene.audit()
    event = LifecycleEvent(
        task_id=task_id, type=TYPE, service="greeter", state=TaskState.SUCCEEDED, at=datetime.now(UTC)
    )
    await scene.hear(event)

    audit = await scene.audit()

    assert (await scene.named(), balance(audit)) == ([], (0, 0, 1, 0, 0))


async def test_an_audit_of_a_large_ledger_counts_what_came_since_the_last_one(scene, monkeypatch):
    monkeypatch.setattr(tallies, "RECOUNTED_ALWAYS", 3)
    old = datetime.now(UTC) - timedelta(hours=3)
    early = await scene.accept(5, created_at=old)
    await scene.hear(*(scene_ended(one) for one in early))
    first = await scene.audit()

    # Old tasks that nobody has told of when all were counted.
    await scene.hear(*(scene_ended(one) for one in await scene.accept(2, created_at=old)))
    await scene.hear(*(scene_ended(one) for one in await scene.accept(4)))
    second = await scene.audit()
    monkeypatch.setattr(tallies, "RECOUNT_EVERY", timedelta(0))
    third = await scene.audit()

    assert [audit.accepted for audit in (first, second, third)] == [5, 9, 11]
    assert [audit.finished for audit in (first, second, third)] == [5, 9, 11]


def scene_ended(task_id: UUID) -> LifecycleEvent:
    return LifecycleEvent(
        task_id=task_id, type=TYPE, state=TaskState.SUCCEEDED, at=datetime.now(UTC), service="greeter", attempt=1
    )


async def test_candidates_are_examined_without_reading_every_dead_letter(gateway_engine):
    """With many running tasks, one hash of all open letters would seem cheaper to the planner than asking for each."""
    async with gateway_engine.begin() as connection:
        await connection.execute(
            text(
                "insert into tasks (id, type, state, service, root_id, created_at, updated_at)"
                " select id, 't', 'running', 'greeter', id, now(), now() - interval '1 h'"
                " from (select gen_random_uuid() as id from generate_series(1, 20000)) as made"
            )
        )
        await connection.execute(
            text(
                "insert into dead_letters (fingerprint, task_id, reason, queue, exchange, routing_key, headers,"
                " properties, body) select decode(md5(n::text), 'hex'), gen_random_uuid(), 'rejected', 'greeter', '',"
                " '', '{}', '{}', '' from generate_series(1, 20000) as n"
            )
        )
        await connection.execute(text("analyze"))
        now = datetime.now(UTC)
        parameters = {"state": "running", "heard_before": now, "limit": candidates.PAGE}
        plan = await connection.execute(text("explain " + candidates._FIRST_PAGE.text), parameters)
        lines = "\n".join(plan.scalars())

    assert "Seq Scan on dead_letters" not in lines, lines
    assert "hashed SubPlan" not in lines, lines


async def test_a_message_that_waits_among_the_dead_letters_is_not_unaccounted_for(scene):
    await scene.accept()
    scene.queues[DEAD_QUEUE] = 1
    await scene.audit()
    await scene.audit()
    assert await scene.named() == []

    scene.queues[DEAD_QUEUE] = 0
    await scene.audit()
    await scene.audit()
    assert len(await scene.named()) == 1
