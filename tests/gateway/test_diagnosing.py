"""What is wrong with a dead letter is found from the message, the manifests and what the worker has told the ledger."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import select

from gateway import catalogue, ledger
from gateway.dead_letters import diagnosing
from gateway.dead_letters.letter import Diagnosis, error_fingerprint
from gateway.dead_letters.storable import CUT, MAX_DEPTH, MAX_TEXT, MAX_VALUES, bounded
from gateway.models import dead_letters
from gateway.projector import TASKS_AT_ONCE, Projector
from taskmesh import celery_protocol, lifecycle
from taskmesh.celery_protocol import TaskMessage
from taskmesh.consuming import Delivery
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.topology import COMMANDS, DEAD_QUEUE, LIFECYCLE, LIFECYCLE_QUEUE

from .conftest import manifest

TYPE = "greeter.person.greet"


def dead(
    message: TaskMessage | None = None, *, reason: str = "rejected", queue: str = "greeter", **changes: Any
) -> Delivery:
    headers, properties, body = celery_protocol.encode(message or TaskMessage(type=TYPE, id=uuid4()))
    death = {"reason": reason, "queue": queue, "exchange": COMMANDS, "routing-keys": [TYPE]}
    return Delivery(
        queue=DEAD_QUEUE,
        exchange="taskmesh.dead",
        routing_key=queue,
        headers={**headers, "x-death": [death], **changes.get("headers", {})},
        properties={**properties, **changes.get("properties", {})},
        body=changes.get("body", body),
        delivery_count=0,
        tag=1,
    )


def told(*events: LifecycleEvent, key: str = "task.failed.greeter") -> Delivery:
    return Delivery(
        queue=LIFECYCLE_QUEUE,
        exchange=LIFECYCLE,
        routing_key=key,
        headers={},
        properties={},
        body=lifecycle.encode(list(events)),
        delivery_count=0,
        tag=1,
    )


def failed(task_id: Any, **fields: Any) -> LifecycleEvent:
    failure = TaskFailure(code="no_stock", message="order 12 has no stock", exception="greeter.errors.NoStock")
    values = {"type": TYPE, "service": "greeter", "at": datetime.now(UTC), "failure": failure, "attempt": 3} | fields
    return LifecycleEvent(task_id=task_id, state=values.pop("state", TaskState.FAILED), **values)


@pytest.fixture
async def projector(gateway_engine) -> Projector:
    async with gateway_engine.begin() as connection:
        await catalogue.store(connection, manifest())
    return Projector(gateway_engine)


@pytest.fixture
def letters(gateway_engine):
    async def read() -> list[Any]:
        async with gateway_engine.connect() as connection:
            return list((await connection.execute(select(dead_letters).order_by(dead_letters.c.id))).all())

    return read


GREETING = TaskMessage(type=TYPE, id=uuid4(), payload={"name": "Ada"})


@pytest.mark.parametrize(
    ("letter", "code", "error"),
    [
        (dead(GREETING, body=b"{"), "malformed", "body is not JSON"),
        (dead(GREETING, body=b"\xff"), "malformed", "body is not UTF-8"),
        (dead(GREETING, properties={"content_type": "text/plain"}), "malformed", "content_type"),
        (dead(GREETING, headers={"eta": "soon"}), "malformed", "eta must be"),
        (dead(TaskMessage(type="greeter.person.hug", id=uuid4())), "unknown_task", "does not announce"),
        (dead(TaskMessage(type=TYPE, id=uuid4(), payload={"times": 0})), "contract_violation", "/payload/name is required"),
        (dead(GREETING, reason="delivery_limit"), "poison", "as often as its queue allows"),
        (dead(GREETING, reason="expired"), "expired", "time to live"),
        (dead(GREETING, reason="maxlen"), "too_long", "queue was full"),
        (dead(GREETING), "rejected", "the worker refused it"),
        (dead(GREETING, queue="nobody"), "rejected", "the worker refused it"),
        (dead(GREETING, queue="greeter.control"), "malformed", "control message"),
        (dead(TaskMessage(type="billing.invoice.issued", id=uuid4(), kind=TaskKind.EVENT), queue="greeter.events"), "rejected", ""),
    ],
)  # fmt: skip
async def test_the_code_says_what_is_wrong(projector, letters, letter, code, error):
    await projector.handle([letter])

    [stored] = await letters()
    assert stored.code == code
    assert error in stored.error


async def test_an_error_points_at_the_fault_and_quotes_no_value(projector, letters):
    await projector.handle([dead(TaskMessage(type=TYPE, id=uuid4(), payload={"name": 5, "on": "secret"}))])

    [stored] = await letters()
    assert stored.error == "/payload/name must be string; /payload/on must be a valid date"


async def test_what_the_worker_has_told_counts_for_more(projector, letters):
    await projector.handle([told(failed(GREETING.id))])
    await projector.handle([dead(GREETING)])

    [stored] = await letters()
    assert (stored.code, stored.error, stored.exception, stored.attempt) == (
        "no_stock",
        "order 12 has no stock",
        "greeter.errors.NoStock",
        3,
    )


async def test_a_letter_is_completed_when_the_worker_is_heard_later(projector, letters):
    await projector.handle([dead(GREETING)])
    [before] = await letters()
    await projector.handle([told(failed(GREETING.id))])

    [after] = await letters()
    assert (before.code, after.code, after.attempt) == ("rejected", "no_stock", 3)
    assert after.error_fingerprint != before.error_fingerprint


async def test_a_letter_is_completed_by_what_comes_in_its_own_batch(projector, letters):
    await projector.handle([dead(GREETING), told(failed(GREETING.id))])

    [stored] = await letters()
    assert stored.code == "no_stock"


async def test_letters_of_one_cause_are_one_group(projector, letters):
    """Whatever their ids and figures are."""
    batch = []
    for number in range(20):
        message = TaskMessage(type=TYPE, id=uuid4(), payload={"name": "Ada"})
        failure = TaskFailure(code="bug", message=f"no row {number} of {uuid4()} for 'Ada {number}'", exception="E")
        batch += [dead(message), told(failed(message.id, failure=failure))]
    await projector.handle(batch)

    assert len({row.error_fingerprint for row in await letters()}) == 1


def test_letters_of_different_causes_are_different_groups():
    no_stock = Diagnosis(code="a", error="no stock")

    prints = {
        error_fingerprint("s", "t", "rejected", no_stock),
        error_fingerprint("s", "t", "delivery_limit", no_stock),
        error_fingerprint("s", "u", "rejected", no_stock),
        error_fingerprint("z", "t", "rejected", no_stock),
        error_fingerprint("s", "t", "rejected", Diagnosis(code="b", error="no stock")),
        error_fingerprint("s", "t", "rejected", Diagnosis(code="a", error="no money")),
        error_fingerprint("s", "t", "rejected", Diagnosis(code="a", error="no stock", exception="E")),
    }

    assert len(prints) == 7


async def test_a_batch_is_diagnosed_with_as_many_queries_as_one_letter(projector, gateway_engine):
    statements: list[str] = []
    sqlalchemy_event.listen(
        gateway_engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )

    await projector.handle([dead()])
    alone = len(statements)
    await projector.handle([dead() for _ in range(100)])

    # The catalogue may be read anew.
    assert len(statements) - alone <= alone + 1


async def test_a_letter_that_nobody_understands_fails_no_batch(projector, letters, monkeypatch):
    monkeypatch.setattr(diagnosing, "_diagnose", lambda *_: 1 / 0)

    await projector.handle([dead(), dead()])

    assert [row.code for row in await letters()] == ["rejected", "rejected"]


async def test_two_like_messages_are_two_letters(projector, letters):
    """Without an id in the message, its broker's headers and properties tell them apart."""
    batch = [dead(GREETING, body=b"?", headers={"id": None}, properties={"message_id": str(n)}) for n in range(3)]

    await projector.handle(batch)
    await projector.handle(batch)

    assert len(await letters()) == 3


async def test_a_redelivery_of_a_letter_is_no_new_letter(projector, letters):
    await projector.handle([dead(GREETING)])
    await projector.handle([dead(GREETING, headers={"x-delivery-count": 3})])

    assert len(await letters()) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"x-death": [None]},
        {"x-death": [{"queue": 7, "reason": [], "routing-keys": [b"\xff"], "time": "then", "exchange": {}}]},
        {"x-death": [], "x-first-death-queue": b"\xff\x00", "x-first-death-reason": {"a": 1}},
        {"task": ["greeter"], "traceparent": 5, "retries": 2**60},
        {"deep": {"a": [[[[[[[[[[[1]]]]]]]]]]]}},
        {"nan": float("nan"), "large": 2**200, "half": "\ud800", "bytes": b"\x00\xff"},
        {"\x00": "\x00", b"\xff": b"\xff"},
    ],
)  # fmt: skip
async def test_letters_with_odd_headers_are_stored(projector, letters, headers):
    await projector.handle([dead(GREETING, headers=headers), dead()])

    assert len(await letters()) == 2


def test_what_is_kept_of_headers_is_bounded():
    deep: Any = "bottom"
    for _ in range(50):
        deep = {"a": deep}

    kept = bounded({"deep": deep, "long": "x" * 100_000, "many": list(range(10_000)), "after": 1})

    depth, value = 0, kept["deep"]
    while isinstance(value, dict):
        depth, value = depth + 1, value["a"]
    assert (depth <= MAX_DEPTH, value) == (True, CUT)
    assert len(kept["long"]) == MAX_TEXT
    assert len(kept["many"]) <= MAX_VALUES + 1
    assert "after" not in kept


async def test_the_protocols_own_headers_survive_junk_beside_them(projector, letters):
    junk = {f"junk {number}": number for number in range(2000)}
    delivery = dead(GREETING)
    delivery.headers = {**junk, **delivery.headers}

    await projector.handle([delivery])

    [stored] = await letters()
    assert celery_protocol.decode(stored.headers, stored.properties, stored.body).id == GREETING.id


async def test_of_a_parcel_only_the_event_that_cannot_be_kept_is_parked(projector, letters, gateway_engine):
    good = [failed(uuid4(), state=TaskState.RUNNING, failure=None) for _ in range(3)]
    bad = failed(uuid4(), state=TaskState.SUCCEEDED, failure=None, result="a\x00b")

    await projector.handle([told(*good[:2], bad, good[2])])

    [stored] = await letters()
    assert [event.task_id for event in lifecycle.decode(stored.body)] == [bad.task_id]
    assert (stored.code, stored.queue) == ("malformed", LIFECYCLE_QUEUE)
    async with gateway_engine.connect() as connection:
        states = [(await ledger.get_task(connection, event.task_id)).state for event in (*good, bad)]
    assert states == ["running", "running", "running", "succeeded"]


async def test_a_message_of_many_tasks_is_told_in_parts_and_the_parent_last(projector, gateway_engine):
    """One statement for all would run into its time limit, each time that it is tried."""
    parent = uuid4()
    children = tuple(
        failed(uuid4(), state=TaskState.QUEUED, failure=None, root_id=parent, parent_id=parent)
        for _ in range(TASKS_AT_ONCE + 10)
    )

    await projector.handle([told(failed(parent, state=TaskState.SUCCEEDED, failure=None, children=children))])

    async with gateway_engine.connect() as connection:
        assert await ledger.count_unfinished(connection, parent) == TASKS_AT_ONCE + 10
        assert (await ledger.get_task(connection, parent)).state == "succeeded"
