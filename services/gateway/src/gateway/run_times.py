"""How long tasks of each type run: a mean that the projector keeps, and that forgets old runs.

Functions take an AsyncConnection first and never commit. A mean is a figure for estimates, so what a projector has not
written yet may be lost with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import pydantic_core
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import run_times

MEMORY: Final = 500
"""Runs that a mean stands for: of a type that has become slower, as many runs later most of the mean is new."""

TYPES_AT_ONCE: Final = 1_000
"""Types that are remembered between two writes; a service that makes up names must not fill the memory."""


@dataclass(slots=True)
class RunTimes:
    """Runs that were heard of and are not written yet; by service and type, how many and how many seconds."""

    sums: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)

    def add(self, service: str, type_name: str, seconds: float) -> None:
        """Note one run."""
        key = (service, type_name)
        if key in self.sums or len(self.sums) < TYPES_AT_ONCE:
            runs, total = self.sums.get(key, (0, 0.0))
            self.sums[key] = runs + 1, total + seconds

    def take(self) -> Mapping[tuple[str, str], tuple[int, float]]:
        """Return what was noted, and begin anew."""
        taken, self.sums = self.sums, {}
        return taken


async def store(connection: AsyncConnection, heard: Mapping[tuple[str, str], tuple[int, float]]) -> None:
    """Let runs that were heard of count in the means of their types."""
    if heard:
        rows = [
            {"service": service, "type": type_name, "runs": runs, "seconds": seconds}
            for (service, type_name), (runs, seconds) in heard.items()
        ]
        await connection.execute(_STORE, {"rows": pydantic_core.to_json(rows).decode(), "memory": MEMORY})


async def means(connection: AsyncConnection) -> dict[tuple[str, str], float]:
    """Return the mean run time in seconds by service and type; types that have never run are missing."""
    rows = await connection.execute(select(run_times.c.service, run_times.c.type, run_times.c.mean_seconds))
    return {(row.service, row.type): row.mean_seconds for row in rows}


_STORE = text(
    """
    insert into run_times as known (service, type, runs, mean_seconds)
    select service, type, runs, seconds / runs
    from json_to_recordset(cast(:rows as json)) as r(service text, type text, runs bigint, seconds double precision)
    order by service, type
    on conflict (service, type) do update
    set mean_seconds = (least(known.runs, :memory) * known.mean_seconds + excluded.runs * excluded.mean_seconds)
                       / (least(known.runs, :memory) + excluded.runs),
        runs = least(known.runs, :memory) + excluded.runs
    """
)
