"""Submissions that are committed together, and still stand or fall each by itself."""

from __future__ import annotations

import asyncio
import contextlib
from uuid import uuid4

import pytest
from pydantic import BaseModel, SecretStr
from sqlalchemy import select, text

import gateway.submissions
from gateway import idempotency
from gateway.idempotency import IdempotencyConflict, Key
from gateway.models import api_keys, tasks
from gateway.new_tasks import NewTask
from gateway.submissions import Submissions
from gateway.transactions import open_engine
from taskmesh.errors import DatabaseUnavailable


class Request(BaseModel):
    name: str


@pytest.fixture
def submissions(gateway_engine):
    return Submissions(gateway_engine, wait_seconds=10)


@pytest.fixture
async def client_id(gateway_engine):
    """A client whose requests have keys."""
    row = {"id": uuid4(), "name": "test", "secret_sha256": b"-" * 32, "scopes": []}
    async with gateway_engine.begin() as connection:
        await connection.execute(api_keys.insert(), row)
    return row["id"]


def task(**fields):
    return NewTask(**({"type": "greeter.person.greet", "service": "greeter", "payload": {"name": "Ada"}} | fields))


async def ids(engine):
    async with engine.connect() as connection:
        return set((await connection.execute(select(tasks.c.id))).scalars())


def key_of(client_id, name="key", *, request="a", response=b"first"):
    return Key.of(Request(name=request), name, api_key_id=client_id, response=response)


async def test_submissions_of_the_same_moment_share_transactions(submissions, gateway_engine):
    new = [task() for _ in range(100)]

    outcomes = await asyncio.gather(*(submissions.submit([each], None) for each in new))

    assert outcomes == [None] * 100
    assert await ids(gateway_engine) == {each.id for each in new}
    async with gateway_engine.connect() as connection:
        transactions = (await connection.execute(text("select count(distinct xmin::text) from tasks"))).scalar_one()
    assert transactions <= 3


async def test_a_submission_alone_is_committed_at_once(submissions, gateway_engine):
    new = task()

    assert await submissions.submit([new], None) is None

    assert await ids(gateway_engine) == {new.id}


async def test_one_that_cannot_be_written_fails_alone(submissions, gateway_engine):
    """PostgreSQL has no NUL in text, and takes back the whole transaction."""
    good, bad = [task() for _ in range(20)], task(payload={"name": "\0"})

    outcomes = await asyncio.gather(
        *(submissions.submit([each], None) for each in [*good[:10], bad, *good[10:]]), return_exceptions=True
    )

    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False] * 10 + [True] + [False] * 10
    assert await ids(gateway_engine) == {each.id for each in good}


async def test_a_key_that_is_used_many_times_at_once_is_one_task(submissions, gateway_engine, client_id):
    new = [task() for _ in range(30)]

    outcomes = await asyncio.gather(
        *(submissions.submit([each], key_of(client_id, response=str(each.id).encode())) for each in new)
    )

    [accepted] = [each for each, first in zip(new, outcomes, strict=True) if first is None]
    assert await ids(gateway_engine) == {accepted.id}
    assert {first for first in outcomes if first is not None} == {str(accepted.id).encode()}


async def test_keys_of_one_transaction_are_each_their_own(submissions, gateway_engine, client_id):
    await submissions.submit([first := task()], key_of(client_id, "0"))
    new = [task() for _ in range(20)]

    outcomes = await asyncio.gather(
        *(submissions.submit([each], key_of(client_id, str(number))) for number, each in enumerate(new))
    )

    assert outcomes == [b"first"] + [None] * 19
    assert await ids(gateway_engine) == {first.id} | {each.id for each in new[1:]}


async def test_a_key_of_another_request_is_a_conflict_of_that_one_alone(submissions, gateway_engine, client_id):
    await submissions.submit([task()], key_of(client_id, "0"))
    others = [task() for _ in range(5)]

    outcomes = await asyncio.gather(
        submissions.submit([task()], key_of(client_id, "0", request="b")),
        *(submissions.submit([each], key_of(client_id, str(number + 1))) for number, each in enumerate(others)),
        return_exceptions=True,
    )

    assert isinstance(outcomes[0], IdempotencyConflict)
    assert outcomes[1:] == [None] * 5


async def test_a_batch_is_committed_whole_or_not_at_all(submissions, gateway_engine):
    with pytest.raises(Exception, match="\\\\u0000"):
        await submissions.submit([task(), task(payload={"name": "\0"}), task()], None)

    assert await ids(gateway_engine) == set()


async def test_everybody_is_told_when_the_database_is_away():
    engine = open_engine(SecretStr("postgresql://nobody@127.0.0.1:1/none"), pool_size=2, wait_seconds=1, role="test")
    submissions = Submissions(engine, wait_seconds=10)

    outcomes = await asyncio.gather(*(submissions.submit([task()], None) for _ in range(10)), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 10
    assert len({id(outcome) for outcome in outcomes}) == 10
    await engine.dispose()


async def test_callers_who_go_away_take_nobody_along(submissions, gateway_engine):
    new = [task() for _ in range(10)]
    callers = [asyncio.create_task(submissions.submit([each], None)) for each in new]
    await asyncio.sleep(0)

    for caller in callers[::2]:
        caller.cancel()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)

    assert outcomes[1::2] == [None] * 5
    # Those who went away had asked, and what is asked for is done.
    assert await ids(gateway_engine) == {each.id for each in new}


async def transactions(engine):
    async with engine.connect() as connection:
        rows = await connection.execute(text("select count(*) from tasks group by xmin::text order by 1"))
        return list(rows.scalars())


async def test_whoever_comes_when_all_have_been_served_is_served_too(submissions, monkeypatch):
    """He once waited for the next one to come."""
    monkeypatch.setattr(gateway.submissions, "TRANSACTIONS", 1)

    async with asyncio.timeout(20):
        for _ in range(10):
            assert await submissions.submit([task()], None) is None


@contextlib.asynccontextmanager
async def locked(engine):
    """Nobody can write a task meanwhile."""
    async with engine.connect() as connection:
        await connection.execute(text("lock table tasks in access exclusive mode"))
        yield


async def test_nobody_waits_for_a_turn_longer_than_he_may(gateway_engine):
    submissions = Submissions(gateway_engine, wait_seconds=0.3)
    new = [task() for _ in range(5)]

    async with locked(gateway_engine):
        begun = []
        for each in new[:2]:
            begun.append(asyncio.create_task(submissions.submit([each], None)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        late = await asyncio.gather(*(submissions.submit([each], None) for each in new[2:]), return_exceptions=True)
    assert await asyncio.gather(*begun) == [None, None]

    assert [type(outcome) for outcome in late] == [DatabaseUnavailable] * 3
    assert await ids(gateway_engine) == {each.id for each in new[:2]}


async def test_somebody_elses_hold_on_a_key_is_waited_for_by_its_own_request_alone(
    submissions, gateway_engine, client_id
):
    others = [task() for _ in range(10)]

    async with gateway_engine.begin() as elsewhere:
        await idempotency.claim(elsewhere, key_of(client_id, "held"))
        repeated = asyncio.create_task(submissions.submit([task()], key_of(client_id, "held")))
        outcomes = await asyncio.gather(*(submissions.submit([each], None) for each in others))
        assert not repeated.done()

    assert outcomes == [None] * 10
    assert await repeated == b"first"
    assert await ids(gateway_engine) == {each.id for each in others}


async def test_no_more_tasks_share_a_transaction_than_may(submissions, gateway_engine, monkeypatch):
    monkeypatch.setattr(gateway.submissions, "TRANSACTIONS", 1)
    monkeypatch.setattr(gateway.submissions, "TASKS_TOGETHER", 5)

    await asyncio.gather(*(submissions.submit([task() for _ in range(count)], None) for count in (1, 3, 3, 7)))

    assert await transactions(gateway_engine) == [3, 4, 7]


async def test_no_more_bytes_share_a_transaction_than_may(submissions, gateway_engine, monkeypatch):
    monkeypatch.setattr(gateway.submissions, "TRANSACTIONS", 1)
    monkeypatch.setattr(gateway.submissions, "BYTES_TOGETHER", 1000)

    await asyncio.gather(*(submissions.submit([task()], None, size=400) for _ in range(5)))

    assert await transactions(gateway_engine) == [1, 2, 2]


async def test_what_has_begun_is_committed_before_the_gateway_ends(submissions, gateway_engine):
    new = [task() for _ in range(3)]
    callers = [asyncio.create_task(submissions.submit([each], None)) for each in new]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()

    await submissions.close()

    assert await ids(gateway_engine) == {each.id for each in new}
