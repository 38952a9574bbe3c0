"""How a running task learns that nobody wants it any more, from a real database."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest
from pydantic import SecretStr

from taskmesh.database import migrate
from taskmesh.testing.waiting import eventually
from taskmesh.worker.watching import CancelWatch


class Counting(CancelWatch):
    """Counts how often the database is asked."""

    looks = 0

    def _look(self) -> bool:
        self.looks += 1
        return super()._look()


@pytest.fixture
def url(database_url: str) -> SecretStr:
    migrate(database_url, scripts=None)
    return SecretStr(database_url)


def cancel(url: SecretStr, task_id: object) -> None:
    with psycopg.connect(url.get_secret_value(), autocommit=True) as connection:
        connection.execute("insert into cancellations (task_id, requested_at) values (%s, now())", (task_id,))


def test_a_tight_loop_asks_the_database_once(url: SecretStr) -> None:
    watch = Counting(url, uuid4())

    assert not any(watch.is_cancelled() for _ in range(1000))
    assert watch.looks == 1


def test_a_cancellation_is_seen_at_the_next_look_and_stays(url: SecretStr) -> None:
    task_id = uuid4()
    watch = Counting(url, task_id)
    watch.is_cancelled()
    cancel(url, task_id)

    eventually(watch.is_cancelled, seconds=5)
    seen = watch.looks

    assert all(watch.is_cancelled() for _ in range(1000))
    assert watch.looks == seen


def test_the_first_look_is_not_put_off(url: SecretStr) -> None:
    """A task may ask only once, right before its expensive step."""
    task_id = uuid4()
    cancel(url, task_id)

    assert CancelWatch(url, task_id).is_cancelled()


def test_a_database_that_is_away_says_nothing() -> None:
    """The task goes on, and learns of the outage when it needs the database itself."""
    nobody = SecretStr("postgresql://nobody@127.0.0.1:1/nothing")

    assert not CancelWatch(nobody, uuid4()).is_cancelled()
