"""What the gateway counts of tasks is what it has committed, once, however it was told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from gateway import ledger, run_times
from gateway.models import task_events
from gateway.new_tasks import NewTask
from gateway.projector import Projector
from taskmesh import lifecycle
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskState
from taskmesh.errors import DatabaseUnavailable
from taskmesh.metrics import instruments

from .test_projector import TYPE, dead, delivery, event

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOW = datetime.now(UTC)


class Kept:
    """What was measured."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, float, Mapping[str, str], str | None]] = []

    def measure(self, instrument: Any, value: float, attributes: Mapping[str, str], origin: Any) -> None:
        trace = None if origin is None else f"{origin.trace_id:032x}"
        self.taken.append((instrument.name, value, attributes, trace))

    def transitions(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for name, value, attributes, _ in self.taken:
            if name == "taskmesh.task.transitions":
                counts[attributes["state"]] += int(value)
        return counts

    def times(self, name: str) -> list[tuple[float, str | None]]:
        """The measurements of a histogram, and their traces."""
        return [(value, trace) for taken, value, _, trace in self.taken if taken == name]


@pytest.fixture
def kept() -> Iterator[Kept]:
    sink = Kept()
    instruments.send_to(sink)
    yield sink
    instruments.send_to(None)


@pytest.fixture
def projector(gateway_engine) -> Projector:
    return Projector(gateway_engine)


async def timeline(engine) -> Counter[str]:
    async with engine.connect() as connection:
        return Counter((await connection.execute(select(task_events.c.state))).scalars())


def told(*events: LifecycleEvent) -> list[Any]:
    return [delivery(lifecycle.encode([one])) for one in events]


async def test_a_batch_that_is_told_again_counts_once(kept, projector, gateway_engine):
    deliveries = told(event(), event(TaskState.SUCCEEDED), event(TaskState.FAILED))
    await projector.handle(deliveries)

    await projector.handle(deliveries)

    assert kept.transitions() == {"running": 1, "succeeded": 1, "failed": 1} == await timeline(gateway_engine)
    assert len(kept.times("taskmesh.projector.lag")) == 3


async def test_a_batch_that_was_rolled_back_counts_when_its_parts_are_committed(kept, projector, gateway_engine):
    """One of its events cannot be kept, so all are tried again, each alone."""
    bad = event(TaskState.SUCCEEDED, result={"text": "a\x00b"})

    await projector.handle(told(event(), bad, event()))

    assert kept.transitions() == {"running": 2, "succeeded": 1} == await timeline(gateway_engine)


async def test_what_was_not_committed_is_not_counted(kept, gateway_engine, monkeypatch):
    """The database goes away in the last statement before the commit."""

    async def lost(*_: object) -> None:
        raise DatabaseUnavailable("it is away")

    monkeypatch.setattr("gateway.projector.sightings.store", lost)

    with pytest.raises(DatabaseUnavailable):
        await Projector(gateway_engine).handle(told(event()))

    assert kept.taken == []


async def test_a_dead_letter_is_counted_once(kept, projector):
    letter = dead(TaskMessage(type=TYPE, id=uuid4()), reason="delivery_limit")
    await projector.handle([letter])

    await projector.handle([letter])

    stored = [attributes for name, _, attributes, _ in kept.taken if name == "taskmesh.dead_letters.stored"]
    assert stored == [{"service": "greeter", "reason": "delivery_limit", "code": "poison"}]


async def test_times_are_the_tasks_own_and_lead_to_its_trace(kept, projector, gateway_engine):
    """Accepted 100 s ago and due 60 s ago, started and failed in 10 s, and run again for 5 s."""

    def ago(seconds: float) -> datetime:
        return NOW - timedelta(seconds=seconds)

    task = NewTask(type=TYPE, service="greeter", payload={}, created_at=ago(100), due_at=ago(60))
    async with gateway_engine.begin() as connection:
        await ledger.submit(connection, [task])
    common = {"task_id": task.id, "traceparent": TRACEPARENT}
    failure = TaskFailure(code="unavailable", message="not yet")

    await projector.handle(
        told(
            event(TaskState.RUNNING, at=ago(50), **common),
            event(TaskState.RETRYING, at=ago(40), started_at=ago(50), due_at=ago(20), failure=failure, **common),
            event(TaskState.SUCCEEDED, at=ago(10), started_at=ago(15), sequence=1, attempt=2, **common),
        )
    )

    trace = TRACEPARENT.split("-")[1]
    assert kept.times("taskmesh.task.wait.duration") == [(10.0, trace)]
    assert kept.times("taskmesh.task.run.duration") == [(10.0, trace), (5.0, trace)]
    assert kept.times("taskmesh.task.duration") == [(90.0, trace)]


async def test_the_projector_keeps_the_mean_run_time_of_each_type(projector, gateway_engine):
    runs = [event(TaskState.SUCCEEDED, at=NOW, started_at=NOW - timedelta(seconds=s)) for s in (1, 3)]
    await projector.handle(told(*runs))

    async with gateway_engine.begin() as connection:
        await run_times.store(connection, projector._run_times.take())

    async with gateway_engine.connect() as connection:
        assert await run_times.means(connection) == {("greeter", TYPE): 2.0}


async def test_a_task_that_was_cancelled_before_it_began_has_not_run(kept, projector, gateway_engine):
    await projector.handle(told(event(TaskState.CANCELLED, started_at=NOW)))

    assert kept.times("taskmesh.task.run.duration") == []
    assert kept.transitions() == {"cancelled": 1}
