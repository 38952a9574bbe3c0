"""Waiting until a healed mesh has done all its work, or does nothing any more although work is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg

from taskmesh.errors import TaskmeshError
from taskmesh_local.faults.evidence import Databases, queues
from taskmesh_local.faults.journal import Journal
from taskmesh_local.faults.supervisor import Supervisor

LOOK_SECONDS = 2.0
AGREED_SECONDS = 6.0
"""The broker's counts are up to five seconds old, so two looks must agree that are further apart."""
TELL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left to be done."""

    tasks: dict[str, int] = field(default_factory=dict)
    outboxes: dict[str, int] = field(default_factory=dict)
    queues: dict[str, int] = field(default_factory=dict)
    down: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        return not (self.tasks or self.outboxes or self.queues or self.down)

    def __str__(self) -> str:
        parts = {"tasks": self.tasks, "outboxes": self.outboxes, "queues": self.queues}
        told = [f"{name} {_listed(counts)}" for name, counts in parts.items() if counts]
        return "; ".join([*told, *([f"down: {', '.join(self.down)}"] if self.down else [])]) or "nothing"


@dataclass(slots=True, eq=False)
class Watch:
    """Looks at a mesh from outside.

    Attributes:
        limit_seconds: How long the work may take.
        standstill_seconds: How long nothing may change although work is left.
    """

    databases: Databases
    management_url: str
    supervisor: Supervisor
    journal: Journal
    limit_seconds: float
    standstill_seconds: float

    async def until_quiet(self) -> bool:
        """True when all work is done; False when the time is over, or nothing happens any more."""
        begun = told = changed = time.monotonic()
        quiet_since: float | None = None
        last: Any = None
        while True:
            rest, progress = await asyncio.to_thread(self._look)
            now = time.monotonic()
            if progress != last:
                last, changed = progress, now
            quiet_since = (quiet_since or now) if rest is not None and rest.nothing else None
            if quiet_since is not None and now - quiet_since >= AGREED_SECONDS:
                return True
            if now - told > TELL_SECONDS:
                self.journal.note(f"left: {rest or 'the servers do not answer'}")
                told = now
            if now - begun > self.limit_seconds or now - changed > self.standstill_seconds:
                self.journal.note(f"gave up waiting; left: {rest}")
                return False
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[Rest | None, Any]:
        try:
            rest = Rest(
                tasks=self.databases.open_tasks(),
                outboxes=_nonzero(self.databases.outboxes),
                queues=_nonzero(lambda: queues(self.management_url)),
                down=tuple(role for role, up in self.supervisor.standing().items() if not up),
            )
            # What changes while a task is retried, though it stays the same number of tasks. The queues are no sign
            # of work: announcements come and go.
            written = [
                self.databases.rows("gateway", "select max(updated_at) from tasks")[0][0],
                *(
                    self.databases.rows(service, "select max(updated_at), sum(starts) from inbox")[0]
                    for service in self.databases.urls
                ),
            ]
        except (psycopg.Error, TaskmeshError):
            return None, None
        return rest, (rest.tasks, rest.outboxes, written)


def _nonzero(count: Callable[[], dict[str, int]]) -> dict[str, int]:
    return {name: number for name, number in count().items() if number}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
