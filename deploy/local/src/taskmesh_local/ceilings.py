"""How many small transactions a second the mesh's PostgreSQL commits: alone, side by side, and on one counter.

Transactions side by side share flushes. Whoever has updated a counter holds its row until the flush, so such ones
cannot; that is in the way of a growing mesh, because invoice numbers come from a counter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString
from uuid import uuid4

import psycopg
from psycopg import sql

SECONDS = 5.0
SIDE_BY_SIDE = 16
INSERT: LiteralString = "insert into ceiling (payload) values (repeat('x', 200))"
TRANSACTIONS: dict[str, tuple[int, tuple[LiteralString, ...]]] = {
    "alone": (1, (INSERT,)),
    "side_by_side": (SIDE_BY_SIDE, (INSERT,)),
    "one_counter": (SIDE_BY_SIDE, (INSERT, "update counter set last = last + 1")),
}


def commits_per_second(administrator_url: str, *, seconds: float = SECONDS) -> dict[str, float]:
    """Measure each kind of transaction in a database that is made for it and dropped again."""
    with _database(administrator_url) as url:
        return {
            name: round(_rate(url, many, statements, seconds), 1) for name, (many, statements) in TRANSACTIONS.items()
        }


@contextmanager
def _database(administrator_url: str) -> Iterator[str]:
    name = f"ceilings_{uuid4().hex[:12]}"
    with psycopg.connect(administrator_url, autocommit=True) as administrator:
        administrator.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            url = f"{administrator_url.rpartition('/')[0]}/{name}"
            with psycopg.connect(url) as connection:
                connection.execute(
                    "create table ceiling (id bigint generated always as identity primary key, payload text)"
                )
                connection.execute("create table counter as select 0 as last")
            yield url
        finally:
            administrator.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _rate(url: str, many: int, statements: tuple[LiteralString, ...], seconds: float) -> float:
    """Transactions a second that `many` connections commit together."""
    counts = [0] * many
    ready = threading.Barrier(many + 1)
    ends = time.monotonic() + 3600

    def commit(number: int) -> None:
        with psycopg.connect(url) as connection:
            ready.wait()
            while time.monotonic() < ends:
                for statement in statements:
                    connection.execute(statement)
                connection.commit()
                counts[number] += 1

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(many)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.monotonic()
    ends = began + seconds
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - began)
