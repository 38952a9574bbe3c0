"""How a task moves by what its workers say: which report is news, and what stays true however late it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState

RANK: Final[Mapping[TaskState, int]] = {
    TaskState.SCHEDULED: 0,
    TaskState.QUEUED: 1,
    TaskState.RUNNING: 2,
    TaskState.RETRYING: 3,
    TaskState.SUCCEEDED: 4,
    TaskState.FAILED: 4,
    TaskState.CANCELLED: 4,
    TaskState.EXPIRED: 4,
}
"""Orders the states within one attempt; between attempts `sequence` decides."""

COUNTED: Final = frozenset(
    {TaskState.RUNNING, TaskState.RETRYING, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED}
)
"""States whose reports say how often the task was started."""

ENDS_ATTEMPT: Final = frozenset({TaskState.RETRYING, TaskState.SUCCEEDED, TaskState.FAILED})
"""States that a run of the task leads to."""

BEFORE_EVERYTHING: Final = -1
"""The sequence of a task that the ledger learns of through its first event: any event is news to it."""

WORKER_LOST: Final = "worker_lost"
"""The code of a task that is queued again because the process that ran it is gone."""

DEAD_LETTERED: Final = "rejected"
"""The code of a failure told by a dead letter whose worker parked it on purpose, and knows more."""

OUTCOME_LOST: Final = "outcome_lost"
"""The code of a failure that only the service's inbox has told of, because the report seemed to be lost."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """A task's row while a batch of events is applied to it; the fields are columns."""

    id: UUID
    type: str
    service: str
    created_at: datetime
    root_id: UUID
    state: TaskState
    sequence: int
    attempt: int
    result: Any
    error: dict[str, Any] | None
    due_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    updated_at: datetime

    @property
    def lost(self) -> bool:
        """True while the task waits to be delivered again because its worker is gone."""
        return self.state is TaskState.QUEUED and (self.error or {}).get("code") == WORKER_LOST

    def accepts(self, event: LifecycleEvent) -> bool:
        """True for what is news; terminal states are final."""
        if self.state.terminal:
            return False
        if event.state is TaskState.CANCELLED:
            # Whoever says so has settled the task for good, whichever attempt it was at.
            return True
        place, told = (self.sequence, _rank(self.state, lost=self.lost)), place_of(event)
        if place == told and told[1] == RANK[TaskState.RUNNING]:
            # An attempt that lost its worker begins again, and only the clock tells which start or loss came last.
            return event.at > self.updated_at
        return told > place

    def note(self, event: LifecycleEvent) -> bool:
        """Keep what stays true however late it is told: when it was first queued and started, how often, and why not.

        Returns:
            Whether that was new.
        """
        before = (self.attempt, self.queued_at, self.started_at, self.error, self.result)
        if event.state in COUNTED:
            self.attempt = max(self.attempt, event.attempt)
        if event.state is TaskState.QUEUED and not tells_of_loss(event):
            self.queued_at = _earlier(self.queued_at, event.at)
        self.started_at = _earlier(self.started_at, event.started_at)
        if event.state is TaskState.RUNNING:
            self.started_at = _earlier(self.started_at, event.at)
        if self._is_outdone_by(event):
            assert event.failure is not None
            self.error, self.worker = event.failure.model_dump(), event.worker or self.worker
        if self.state is event.state is TaskState.SUCCEEDED and self.result is None:
            # An audit told of the end, which the inbox knows without its result, and the report comes after all.
            self.result = event.result
        return before != (self.attempt, self.queued_at, self.started_at, self.error, self.result)

    def _is_outdone_by(self, event: LifecycleEvent) -> bool:
        """True if the task failed as a dead letter or an inbox says, and the worker's own word comes after that."""
        if self.state is not TaskState.FAILED or event.state is not TaskState.FAILED or event.failure is None:
            return False
        known = self.error or {}
        vague = known.get("code") in {DEAD_LETTERED, OUTCOME_LOST} and known.get("exception") is None
        return vague and (event.failure.code != DEAD_LETTERED or event.failure.exception is not None)

    def move(self, event: LifecycleEvent) -> None:
        """Go to the state that the event tells of."""
        self.state, self.sequence, self.updated_at = event.state, max(self.sequence, event.sequence), event.at
        self.due_at = event.due_at or self.due_at
        self.worker = event.worker or self.worker
        if event.failure is not None:
            self.error = event.failure.model_dump()
        elif event.state in {TaskState.SUCCEEDED, TaskState.CANCELLED}:
            self.error = None
        if event.state.terminal:
            self.result, self.finished_at = event.result, event.at


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An event that was news, and the task as it was before.

    Attributes:
        type, service: The task's, as the ledger has them.
        wanted_at: From when on its caller waits for it: its acceptance, or the time that was asked for.
        due_at: From when on it could have been started.
        before: The state that it was in.
        is_unstarted: No start of it was known.
    """

    event: LifecycleEvent
    type: str
    service: str
    wanted_at: datetime
    due_at: datetime
    before: TaskState
    is_unstarted: bool

    @classmethod
    def of(cls, task: Progress, event: LifecycleEvent) -> Step:
        """The step that the task takes by the event; to be asked before it takes it."""
        return cls(
            event=event,
            type=task.type,
            service=task.service,
            wanted_at=task.queued_at or (task.due_at if task.state is TaskState.SCHEDULED else None) or task.created_at,
            due_at=task.due_at or task.created_at,
            before=task.state,
            is_unstarted=task.started_at is None,
        )

    @property
    def code(self) -> str | None:
        """Why it failed, or is to be tried again."""
        failure = self.event.failure if self.event.state in {TaskState.FAILED, TaskState.RETRYING} else None
        return failure.code if failure is not None else None

    @property
    def wait_seconds(self) -> float | None:
        """How long the task had been due when it started; None for a step that tells of no first start."""
        if not self.is_unstarted or self.event.state not in COUNTED:
            return None
        started_at = self.event.started_at or (self.event.at if self.event.state is TaskState.RUNNING else None)
        return (started_at - self.due_at).total_seconds() if started_at is not None else None

    @property
    def run_seconds(self) -> float | None:
        """How long the attempt ran whose end the step tells of; None for any other step."""
        ended = self.event.state in ENDS_ATTEMPT or (
            # One that was cancelled before it began says when that would have been.
            self.event.state is TaskState.CANCELLED and self.before is TaskState.RUNNING
        )
        if not ended or self.event.started_at is None:
            return None
        return (self.event.at - self.event.started_at).total_seconds()

    @property
    def total_seconds(self) -> float | None:
        """From when the task was wanted to its end; None for a step that is not its end, or comes before that."""
        if not self.event.state.terminal or self.event.at < self.wanted_at:
            return None
        return (self.event.at - self.wanted_at).total_seconds()


def tells_of_loss(event: LifecycleEvent) -> bool:
    """True for the report that a task is queued again because its worker is gone."""
    return event.state is TaskState.QUEUED and event.failure is not None and event.failure.code == WORKER_LOST


def place_of(event: LifecycleEvent) -> tuple[int, int]:
    """Where an event belongs among all events of its task."""
    return event.sequence, _rank(event.state, lost=tells_of_loss(event))


def _rank(state: TaskState, *, lost: bool) -> int:
    return RANK[TaskState.RUNNING] if lost else RANK[state]


def _earlier(known: datetime | None, told: datetime | None) -> datetime | None:
    return min((at for at in (known, told) if at is not None), default=None)
