"""What a task costs each part of the mesh, as `python -m taskmesh_local costs` has measured it."""

from __future__ import annotations

from datetime import date
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

MEASURED = Path(__file__).with_name("measured.json")
"""Written by the command, never by hand."""


class Kind(BaseModel):
    """For one task that a caller submits, with all that follows from it.

    Attributes:
        tasks: How many tasks that is.
        cpu: Milliseconds on a CPU, of each process with its children.
        wal: Bytes that PostgreSQL wrote ahead, of all services together.
        commits: Transactions, by database.
        rows: Rows inserted, updated and deleted, by database.
        kept: Bytes that stay in tables and indexes, by database; the outbox is left out.
        published: Messages, by exchange.
    """

    model_config = ConfigDict(frozen=True)

    tasks: float
    cpu: dict[str, float]
    wal: float
    commits: dict[str, float]
    rows: dict[str, float]
    kept: dict[str, float]
    published: dict[str, float]


class Costs(BaseModel):
    """One measurement of a whole mesh on one machine."""

    model_config = ConfigDict(frozen=True)

    measured_on: date
    machine: str
    versions: dict[str, str]
    repetitions: int
    kinds: dict[str, Kind]
    memory_mb: dict[str, list[float]]
    database_connections: dict[str, int]
    broker_connections: dict[str, int]
    commits_per_second: dict[str, float]
    """Of small transactions: `alone` on one connection, then `side_by_side` and on `one_counter` on 16."""


@cache
def measured() -> Costs:
    """The figures that this release was measured with."""
    return Costs.model_validate_json(MEASURED.read_bytes())
