"""What a caller can ask of the audit, and what it answers, as operations without I/O (exchange.py)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from taskmesh.client.exchange import Operation, Patience, Request, call
from taskmesh.client.operations import Seconds, in_seconds
from taskmesh.client.results import Result

LONGEST_AUDIT_SECONDS = 60.0
"""How long the gateway waits for an audit."""


class Gap(Result):
    """A queue that holds messages, but fewer than the tasks that can be nowhere else."""

    queue: str
    presumed: int
    messages: int
    missing: int


class Audit(Result):
    """One audit: `accepted` is the sum of the five numbers after it."""

    id: int
    started_at: datetime
    finished_at: datetime
    accepted: int
    waiting: int
    running: int
    finished: int
    dead: int
    unaccounted: int
    suspected: int = 0
    """Tasks that the next audit will name, unless it finds them."""
    mended: int = 0
    """Tasks that had ended in their service, and whose report was lost."""
    redriven: int = 0
    """Tasks whose message was sent again."""
    unknown: Mapping[str, int] = {}
    """Tasks that could not be judged, by reason."""
    gaps: tuple[Gap, ...] = ()
    grace_seconds: float = 0.0
    examined: int = 0
    complete: bool = True
    """False if there were too many silent tasks for one audit."""

    @property
    def settled(self) -> bool:
        """Whether the next audit has nothing to add: nobody is unaccounted for, suspected, or could not be judged."""
        return self.complete and not (self.unaccounted or self.suspected or any(self.unknown.values()))


class UnaccountedTask(Result):
    """A task that nobody can account for."""

    task_id: UUID
    type: str
    service: str
    since: datetime | None = None
    last_seen_at: datetime | None = None
    last_seen_where: str | None = None
    redrives: int = 0
    redriven_at: datetime | None = None


class Reconciliation(Result):
    """The last audit, and whom it has named."""

    audit: Audit | None = None
    """None before the first."""
    unaccounted: tuple[UnaccountedTask, ...] = ()
    """The oldest 500."""


def last(patience: Patience) -> Operation[Reconciliation]:
    """The last audit."""
    answer = yield from call(Request(method="GET", path="/v1/reconciliation", repeatable=True), patience)
    return Reconciliation.model_validate_json(answer.body)


def run(grace: Seconds | None, patience: Patience) -> Operation[Reconciliation]:
    """An audit that starts after the call. Two of them do no harm, so it is safe to repeat."""
    body = {} if grace is None else {"grace_seconds": in_seconds(grace)}
    request = Request(
        method="POST",
        path="/v1/reconciliation:run",
        body=body,
        repeatable=True,
        hold_seconds=LONGEST_AUDIT_SECONDS,
    )
    answer = yield from call(request, patience)
    return Reconciliation.model_validate_json(answer.body)
