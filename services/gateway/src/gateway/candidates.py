"""Unfinished tasks of which nothing has been heard for a while: those that an audit must account for.

Functions take an AsyncConnection first and never commit. Tasks are read page by page, so that an audit costs the same
however many tasks there are; what is left over is examined by the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from taskmesh.contracts.lifecycle import TaskKind, TaskState

PAGE: Final = 500
UNFINISHED: Final = (TaskState.RUNNING, TaskState.QUEUED, TaskState.RETRYING, TaskState.SCHEDULED)
"""In the order in which they are examined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A task that has not ended.

    Attributes:
        parent_service: Whose task sent it.
        in_outbox: Its message waits in the gateway's own outbox.
        is_dead: It has an open dead letter.
    """

    id: UUID
    type: str
    kind: TaskKind
    service: str
    state: TaskState
    sequence: int
    created_at: datetime
    updated_at: datetime
    root_id: UUID
    parent_id: UUID | None
    event_id: UUID | None
    parent_service: str | None
    in_outbox: bool
    is_dead: bool

    @property
    def queue(self) -> str:
        """Where its message is when it is with the broker."""
        return f"{self.service}.events" if self.kind is TaskKind.EVENT else self.service

    @property
    def sender(self) -> tuple[UUID, str] | None:
        """The id under which a service may still hold its first message in the outbox, and that service.

        None if the gateway itself has sent it. An event is sent by the service that its type belongs to.
        """
        if self.kind is TaskKind.EVENT and self.event_id is not None:
            return self.event_id, self.type.partition(".")[0]
        return (self.id, self.parent_service) if self.parent_service is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where an audit has stopped, for the next one to go on.

    Attributes:
        after: `created_at` and id of the last task of this state that was examined; None before the first.
    """

    state: TaskState
    after: tuple[datetime, UUID] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        after = None if self.after is None else [self.after[0].isoformat(), str(self.after[1])]
        return {"state": self.state.value, "after": after}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Read what `to_json` made."""
        after = said["after"]
        place = None if after is None else (datetime.fromisoformat(after[0]), UUID(after[1]))
        return cls(state=TaskState(said["state"]), after=place)


BEGINNING: Final = Cursor(state=UNFINISHED[0])


async def page(
    connection: AsyncConnection, *, heard_before: datetime, cursor: Cursor
) -> tuple[list[Candidate], Cursor | None]:
    """Return some candidates of one state, oldest first, and where to go on; None after the last.

    Args:
        heard_before: Leave out tasks with newer news.
        cursor: Where to begin.
    """
    parameters: dict[str, Any] = {"state": cursor.state, "heard_before": heard_before, "limit": PAGE}
    if cursor.after is not None:
        parameters |= {"created_at": cursor.after[0], "id": cursor.after[1]}
    statement = _FIRST_PAGE if cursor.after is None else _NEXT_PAGE
    found = [_candidate(row) for row in (await connection.execute(statement, parameters)).mappings()]
    if len(found) == PAGE:
        return found, Cursor(state=cursor.state, after=(found[-1].created_at, found[-1].id))
    following = UNFINISHED.index(cursor.state) + 1
    return found, Cursor(state=UNFINISHED[following]) if following < len(UNFINISHED) else None


async def of_tasks(connection: AsyncConnection, task_ids: Iterable[UUID]) -> list[Candidate]:
    """Return those of the tasks that have not ended."""
    rows = (await connection.execute(_OF_TASKS, {"ids": sorted(task_ids)})).mappings()
    return [_candidate(row) for row in rows]


def _candidate(row: RowMapping) -> Candidate:
    return Candidate(**{**row, "kind": TaskKind(row["kind"]), "state": TaskState(row["state"])})


_CHOSEN: Final = """
    with chosen as materialized (
        select id, type, kind, service, state, sequence, created_at, updated_at, root_id, parent_id, event_id
        from tasks
"""

# Not `exists`, which the planner may turn into one reading of all messages and letters.
_EXAMINE: Final = """
    )
    select chosen.*, parents.service as parent_service,
           (select true from outbox where outbox.task_id = chosen.id limit 1) is not null as in_outbox,
           (select true from dead_letters where dead_letters.task_id = chosen.id and state = 'open' limit 1) is not null
               as is_dead
    from chosen left join tasks as parents on parents.id = chosen.parent_id
    order by chosen.created_at, chosen.id
"""

# The planner must see that the partial index `tasks_state` covers it, whatever the parameter is.
_OF_STATE: Final = " where state <> 'succeeded' and state = :state and updated_at <= :heard_before"

_ORDER: Final = " order by created_at, id limit :limit"

_FIRST_PAGE = text(_CHOSEN + _OF_STATE + _ORDER + _EXAMINE)
_NEXT_PAGE = text(_CHOSEN + _OF_STATE + " and (created_at, id) > (:created_at, :id)" + _ORDER + _EXAMINE)

_OF_TASKS = text(
    _CHOSEN + " where id = any(:ids) and state in ('scheduled', 'queued', 'running', 'retrying')" + _EXAMINE
)
