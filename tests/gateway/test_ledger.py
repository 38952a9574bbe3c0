"""The ledger's promise: whatever comes late, twice or in the wrong order, the task ends where it really ended."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from gateway import ledger
from gateway.models import task_events, tasks
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
FINAL = ("state", "attempt", "sequence", "result", "error", "finished_at", "started_at", "root_id", "type", "service")
LOST = TaskFailure(code="worker_lost", message="the process is gone")
DEAD = TaskFailure(code="rejected", message="the message was dead-lettered from billing: rejected")


def event(task_id: UUID, state: TaskState, minute: float = 0, **fields: Any) -> LifecycleEvent:
    at = NOON + timedelta(minutes=minute)
    values: dict[str, Any] = {"type": "billing.invoice.issue", "service": "billing", "root_id": task_id} | fields
    return LifecycleEvent(task_id=task_id, state=state, at=at, **values)


def life(task_id: UUID, retries: int, end: TaskState, *, losses: bool = False) -> list[LifecycleEvent]:
    """Everything that a worker says of a task with so many failed attempts before its end.

    With `losses` the process that runs an attempt is killed the first time, each time.
    """
    events = [event(task_id, TaskState.QUEUED, attempt=1)]
    started_at = NOON + timedelta(minutes=1)
    for attempt in range(retries + 1):
        minute = 10 * attempt + 1
        place: dict[str, Any] = {"sequence": attempt, "attempt": attempt + 1}
        if attempt:
            events.append(event(task_id, TaskState.QUEUED, minute - 0.5, **place))
        events.append(event(task_id, TaskState.RUNNING, minute, worker="host:1", **place))
        if losses:
            events.append(event(task_id, TaskState.QUEUED, minute + 0.2, failure=LOST, **place))
            events.append(event(task_id, TaskState.RUNNING, minute + 0.4, worker="host:2", **place))
        # The later reports of an attempt repeat when it was started, as workers do.
        place["started_at"] = started_at + timedelta(minutes=10 * attempt)
        failure = TaskFailure(code="unavailable", message=f"attempt {attempt}")
        if attempt < retries:
            events.append(event(task_id, TaskState.RETRYING, minute + 1, failure=failure, **place))
        else:
            failed = {"failure": failure} if end is TaskState.FAILED else {"result": {"n": retries}}
            events.append(event(task_id, end, minute + 1, **place, **failed))
    return events


async def advance(engine, *events: LifecycleEvent) -> int:
    async with engine.begin() as connection:
        return len(await ledger.advance(connection, events))


async def row_of(engine, task_id: UUID) -> dict[str, Any]:
    async with engine.connect() as connection:
        return dict((await ledger.get_task(connection, task_id))._mapping)


async def timeline(engine, task_id: UUID) -> list[tuple[str, int]]:
    async with engine.connect() as connection:
        rows = await connection.execute(
            select(task_events).where(task_events.c.task_id == task_id).order_by(task_events.c.seq)
        )
        return [(row.state, row.attempt) for row in rows]


async def test_any_order_and_repetition_of_a_tasks_reports_ends_in_the_same_row(gateway_engine):
    """Reports are dealt out in any order, some of them again, in batches cut anywhere; the last row is the same."""

    async def try_once(retries: int, end: TaskState, seed: int, *, losses: bool) -> None:
        dice = random.Random(seed)
        straight, shuffled = uuid4(), uuid4()
        await advance(gateway_engine, *life(straight, retries, end, losses=losses))
        events = life(shuffled, retries, end, losses=losses)
        events += dice.choices(events, k=dice.randrange(len(events)))
        # The end is among them in any case; before it, some reports may never come at all.
        dice.shuffle(events)
        while events:
            size = dice.randint(1, len(events))
            await advance(gateway_engine, *events[:size])
            events = events[size:]
        expected, found = await row_of(gateway_engine, straight), await row_of(gateway_engine, shuffled)
        expected["root_id"] = shuffled
        assert {name: found[name] for name in FINAL} == {name: expected[name] for name in FINAL}
        states = [state for state, _ in await timeline(gateway_engine, shuffled)]
        assert states[-1] == end
        assert sum(TaskState(state).terminal for state in states) == 1

    loop = asyncio.get_running_loop()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        retries=st.integers(0, 3),
        end=st.sampled_from([TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED]),
        seed=st.integers(0, 2**32),
        losses=st.booleans(),
    )
    def check(retries: int, end: TaskState, seed: int, losses: bool) -> None:
        asyncio.run_coroutine_threadsafe(try_once(retries, end, seed, losses=losses), loop).result(30)

    await asyncio.to_thread(check)


async def test_a_timeline_has_one_row_for_each_thing_that_was_news(gateway_engine):
    task_id = uuid4()

    accepted = await advance(gateway_engine, *life(task_id, 1, TaskState.SUCCEEDED))
    again = await advance(gateway_engine, *life(task_id, 1, TaskState.SUCCEEDED))

    assert (accepted, again) == (6, 0)
    assert await timeline(gateway_engine, task_id) == [
        ("queued", 0),
        ("running", 1),
        ("retrying", 1),
        ("queued", 1),
        ("running", 2),
        ("succeeded", 2),
    ]


async def test_a_terminal_state_is_final_even_for_a_later_attempt(gateway_engine):
    task_id = uuid4()
    await advance(gateway_engine, event(task_id, TaskState.CANCELLED))

    accepted = await advance(gateway_engine, event(task_id, TaskState.RUNNING, sequence=5, attempt=6))

    assert accepted == 0
    assert (await row_of(gateway_engine, task_id))["state"] == "cancelled"


async def test_the_end_of_an_attempt_that_was_superseded_ends_nothing(gateway_engine):
    task_id = uuid4()
    await advance(gateway_engine, event(task_id, TaskState.RUNNING, 5, sequence=1, attempt=2))

    await advance(gateway_engine, event(task_id, TaskState.FAILED, 9, sequence=0, attempt=1))

    assert (await row_of(gateway_engine, task_id))["state"] == "running"


async def test_a_task_whose_worker_is_lost_is_queued_again(gateway_engine):
    task_id = uuid4()
    await advance(gateway_engine, event(task_id, TaskState.RUNNING, 1))

    await advance(gateway_engine, event(task_id, TaskState.QUEUED, 2, failure=LOST))

    row = await row_of(gateway_engine, task_id)
    assert (row["state"], row["error"]["code"], row["queued_at"]) == ("queued", "worker_lost", None)


async def test_starts_and_losses_take_turns_however_they_arrive(gateway_engine):
    """Twice lost and begun a third time: the last by the clock wins in each order of arrival."""
    reports = [
        (TaskState.RUNNING, 1, None),
        (TaskState.QUEUED, 2, LOST),
        (TaskState.RUNNING, 3, None),
        (TaskState.QUEUED, 4, LOST),
        (TaskState.RUNNING, 5, None),
    ]

    for order in itertools.permutations(reports):
        task_id = uuid4()
        for state, minute, failure in order:
            await advance(gateway_engine, event(task_id, state, minute, failure=failure))
        assert (await row_of(gateway_engine, task_id))["state"] == "running"


async def test_a_loss_that_is_told_late_moves_no_task_that_has_gone_on(gateway_engine):
    retried, over = uuid4(), uuid4()
    await advance(gateway_engine, event(retried, TaskState.QUEUED, 9, sequence=1, attempt=2))
    await advance(gateway_engine, event(over, TaskState.SUCCEEDED, 9))

    told = [event(task_id, TaskState.QUEUED, 10, failure=LOST) for task_id in (retried, over)]
    accepted = await advance(gateway_engine, *told)

    assert accepted == 0
    assert (await row_of(gateway_engine, over))["state"] == "succeeded"


async def test_the_workers_own_word_for_a_failure_outdoes_that_of_its_dead_letter(gateway_engine):
    task_id = uuid4()
    await advance(gateway_engine, event(task_id, TaskState.FAILED, 1, failure=DEAD))
    own = TaskFailure(code="contract_violation", message="name is missing", exception="taskmesh.ContractViolation")

    accepted = await advance(gateway_engine, event(task_id, TaskState.FAILED, 2, failure=own, attempt=3))

    row = await row_of(gateway_engine, task_id)
    assert (accepted, row["error"]["code"], row["attempt"]) == (0, "contract_violation", 3)


async def test_a_dead_letter_changes_nothing_that_the_worker_has_said(gateway_engine):
    task_id = uuid4()
    own = TaskFailure(code="rejected", message="no such invoice", exception="billing.NoSuchInvoice")
    await advance(gateway_engine, event(task_id, TaskState.FAILED, 1, failure=own))

    await advance(gateway_engine, event(task_id, TaskState.FAILED, 2, failure=DEAD))

    assert (await row_of(gateway_engine, task_id))["error"]["message"] == "no such invoice"


async def test_a_failure_tells_what_the_task_was_asked_to_do(gateway_engine):
    task_id, failure = uuid4(), TaskFailure(code="exception", message="no")

    await advance(gateway_engine, event(task_id, TaskState.FAILED, failure=failure, payload={"n": 1}))

    assert (await row_of(gateway_engine, task_id))["payload"] == {"n": 1}


async def test_a_payload_that_is_known_stays(gateway_engine):
    new = ledger.NewTask(type="a.b", service="a", payload={"n": 1})
    async with gateway_engine.begin() as connection:
        await ledger.submit(connection, [new])

    failure = TaskFailure(code="exception", message="no")
    await advance(gateway_engine, event(new.id, TaskState.FAILED, failure=failure, payload={"n": 2}))

    assert (await row_of(gateway_engine, new.id))["payload"] == {"n": 1}


async def test_a_cancellation_by_the_service_holds_whichever_attempt_it_names(gateway_engine):
    task_id = uuid4()
    await advance(gateway_engine, event(task_id, TaskState.RETRYING, 5, sequence=3, attempt=4))

    await advance(gateway_engine, event(task_id, TaskState.CANCELLED, 6, sequence=0, attempt=0))

    row = await row_of(gateway_engine, task_id)
    assert (row["state"], row["sequence"], row["attempt"]) == ("cancelled", 3, 4)


async def test_a_task_that_nobody_submitted_here_is_added_with_its_family(gateway_engine):
    root, child, event_id = uuid4(), uuid4(), uuid4()

    await advance(
        gateway_engine,
        event(
            child,
            TaskState.RUNNING,
            type="billing.invoice.issued",
            service="email",
            kind=TaskKind.EVENT,
            root_id=root,
            parent_id=root,
            event_id=event_id,
            attempt=1,
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
    )

    row = await row_of(gateway_engine, child)
    assert (row["root_id"], row["parent_id"], row["event_id"], row["kind"]) == (root, root, event_id, "event")
    assert (row["service"], row["payload"], row["trace_id"]) == ("email", None, "0af7651916cd43dd8448eb211c80319c")
    assert row["created_at"] == row["started_at"] == NOON


async def test_a_failure_is_shown_until_the_task_succeeds(gateway_engine):
    task_id = uuid4()
    *before, last = life(task_id, 1, TaskState.SUCCEEDED)
    await advance(gateway_engine, *before)
    running = await row_of(gateway_engine, task_id)

    await advance(gateway_engine, last)

    assert (running["state"], running["error"]["message"]) == ("running", "attempt 0")
    assert (await row_of(gateway_engine, task_id))["error"] is None


async def test_projectors_with_overlapping_batches_neither_deadlock_nor_lose_anything(gateway_engine):
    """Eight at a time write the same forty tasks, known and unknown ones, each in its own order."""
    ids = [uuid4() for _ in range(40)]
    everything = [one for task_id in ids for one in life(task_id, 1, TaskState.SUCCEEDED)]
    await advance(gateway_engine, *(event(task_id, TaskState.QUEUED) for task_id in ids[::3]))

    async def project(seed: int) -> None:
        events = list(everything)
        random.Random(seed).shuffle(events)
        for start in range(0, len(events), 60):
            await advance(gateway_engine, *events[start : start + 60])

    await asyncio.gather(*(project(seed) for seed in range(8)))

    async with gateway_engine.connect() as connection:
        states = (await connection.execute(select(tasks.c.state, func.count()).group_by(tasks.c.state))).all()
        ends = await connection.execute(
            select(func.count()).select_from(task_events).where(task_events.c.state == "succeeded")
        )
        assert [tuple(row) for row in states] == [("succeeded", 40)]
        assert ends.scalar_one() == 40


async def test_a_tree_is_notified_once_for_a_batch(gateway_engine, gateway_url):
    import psycopg

    root = uuid4()
    children = [uuid4() for _ in range(3)]
    async with await psycopg.AsyncConnection.connect(gateway_url, autocommit=True) as listener:
        await listener.execute("listen gateway_tasks")

        await advance(gateway_engine, *(event(child, TaskState.RUNNING, root_id=root) for child in children))

        heard = [notification.payload async for notification in listener.notifies(timeout=5, stop_after=1)]
    assert heard == [root.hex]


@pytest.mark.parametrize("size", [1, 500])
async def test_a_batch_takes_the_same_number_of_statements_whatever_its_size(gateway_engine, size):
    from sqlalchemy import event as sqlalchemy_event

    statements: list[str] = []
    sqlalchemy_event.listen(
        gateway_engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )

    await advance(gateway_engine, *(event(uuid4(), TaskState.RUNNING) for _ in range(size)))

    assert len(statements) == 5


async def test_nothing_is_written_when_the_callers_transaction_is_undone(gateway_engine):
    new = ledger.NewTask(type="a.b", service="a", payload={})

    with pytest.raises(ZeroDivisionError):
        async with gateway_engine.begin() as connection:
            await ledger.submit(connection, [new])
            raise ZeroDivisionError

    assert await _counts(gateway_engine) == [0, 0]


async def _counts(engine) -> Sequence[int]:
    async with engine.connect() as connection:
        return [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (tasks, task_events)
        ]
