"""Which processes were killed, and when: the only reason why a span may be missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

KILLED = frozenset(
    {
        "running task has lost its process",
        "running task killed: it has exceeded its hard time limit",
        "running task killed: its cancellation is forced",
        "worker ends: its loop has failed",
    }
)
"""What a worker logs of children that the campaign has not killed: a poisonous task, a time limit, a cancellation; and
all of them, when the worker itself has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """A process that had no time to export what it held.

    Attributes:
        role: `service-role`, as in `make status`.
        since: When it last could have exported something, in seconds of the epoch.
        at: When it was gone, at the latest.
    """

    role: str
    pid: int
    since: float
    at: float

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid}, {datetime.fromtimestamp(self.at).astimezone():%H:%M:%S})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """A role's main process did nothing for some time, in seconds of the epoch."""

    role: str
    begin: float
    end: float


NOTICED_SECONDS = 5.0
"""A main process that goes on has noticed by then which children it has lost meanwhile."""


def told_by_workers(logs: Iterable[tuple[str, Path]], standstills: Sequence[Standstill] = ()) -> Iterator[Killed]:
    """The children that workers tell of as killed.

    Args:
        logs: Roles and their logs, in JSON.
        standstills: When roles were stopped: who is stopped tells of a child later than it was killed.
    """
    for role, log in logs:
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            if not any(message in line for message in KILLED):
                continue
            try:
                told = json.loads(line)
            except ValueError:
                # Cut off: its writer was killed, too.
                continue
            at = datetime.fromisoformat(told["at"]).timestamp()
            unnoticed = [
                it.begin for it in standstills if it.role == role and it.begin <= at <= it.end + NOTICED_SECONDS
            ]
            yield Killed(role=role, pid=told["worker"] or 0, since=min([at, *unnoticed]), at=at)
