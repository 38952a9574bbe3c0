"""What travels over HTTP: requests as they are read, answers as they are shown."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Protocol, Self
from uuid import UUID

import pydantic_core
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from sqlalchemy import Row

from gateway.ledger import Position
from taskmesh.contracts.lifecycle import TaskState

MAX_DELAY = timedelta(days=366)


_RFC_3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _as_written(moment: object) -> object:
    # Pydantic would also take a number for seconds, or for milliseconds, since 1970.
    if isinstance(moment, datetime) or (isinstance(moment, str) and _RFC_3339.fullmatch(moment)):
        return moment
    raise ValueError("must be an RFC 3339 time with an offset, such as 2026-11-22T12:00:00Z")


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        # In the first and the last hours of the calendar.
        raise ValueError("is out of range") from error


Utc = Annotated[AwareDatetime, BeforeValidator(_as_written), AfterValidator(_in_utc)]
"""A time with an offset, kept and shown in UTC."""

Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
TypeName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class TaskSubmission(BaseModel):
    """A task that a caller asks for."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    type: TypeName
    """A task type that some worker has announced; see `GET /v1/types`."""
    payload: dict[str, Any]
    """What the type's JSON Schema asks for."""
    run_at: Utc | None = None
    """Not started before."""
    delay_seconds: Annotated[float, Field(ge=0, le=MAX_DELAY.total_seconds(), allow_inf_nan=False)] | None = None
    """The same, counted from now; at most 366 days. Not both."""
    expires_at: Utc | None = None
    """Not started after: it becomes `expired` instead."""
    priority: Annotated[int, Field(ge=0, le=9)] | None = None
    tags: Annotated[list[Tag], Field(max_length=20)] = []

    @model_validator(mode="after")
    def _one_due_time(self) -> Self:
        if self.run_at is not None and self.delay_seconds is not None:
            raise ValueError("give run_at or delay_seconds, not both")
        return self

    def due_at(self, now: datetime) -> datetime | None:
        """When it shall start; None means at once."""
        if self.run_at is not None:
            return self.run_at
        return now + timedelta(seconds=self.delay_seconds) if self.delay_seconds else None


class BatchSubmission(BaseModel):
    """Tasks that are accepted together or not at all."""

    model_config = ConfigDict(extra="forbid")

    tasks: Annotated[list[TaskSubmission], Field(min_length=1, max_length=500)]


class FailureView(BaseModel):
    """Why a task, or its last attempt, failed."""

    code: str
    message: str
    exception: str | None = None


class TaskView(BaseModel):
    """A task as callers see it. Times are RFC 3339 in UTC."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    id: UUID
    type: str
    kind: str
    state: TaskState
    attempt: int
    """How often it was started; 0 until the first start."""
    service: str
    payload: dict[str, Any] | None
    """Null for tasks that services started themselves: the gateway never sees their payloads."""
    result: Any
    error: FailureView | None
    priority: int | None
    tags: list[str]
    parent_id: UUID | None
    root_id: UUID
    """The task that a caller asked for; a task that nobody else caused is its own root."""
    schedule_id: UUID | None
    created_at: Utc
    due_at: Utc | None
    expires_at: Utc | None
    queued_at: Utc | None
    started_at: Utc | None
    finished_at: Utc | None
    updated_at: Utc
    trace_id: str | None
    cancel_requested_at: Utc | None
    """When somebody asked for its end; whether it came to that, the state says."""
    cancel_reason: str | None
    retry_of: UUID | None
    """The task that this one is another try of."""
    retried_as: UUID | None
    """The next try of this one."""

    @classmethod
    def of(cls, row: Row[Any] | Mapping[str, Any]) -> TaskView:
        """The view of a row of the ledger."""
        return cls.model_validate(row)

    @classmethod
    def json_of(cls, row: Mapping[str, Any]) -> bytes:
        """The view of a row that was made here, as it is sent: a new task's needs no reading, only writing."""
        return pydantic_core.to_json({name: row[name] for name in _SHOWN})

    def without_contents(self) -> TaskView:
        """The view for a caller who may not read what the task was given and what it gave."""
        return self.model_copy(update={"payload": None, "result": None})


_SHOWN: Final = tuple(TaskView.model_fields)


class TaskPage(BaseModel):
    """One page of tasks, newest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    items: list[TaskView]
    next_cursor: str | None = None
    """For the next page; null on the last."""


class TaskBatch(BaseModel):
    """The tasks of a batch, in the order in which they were sent."""

    items: list[TaskView]

    @classmethod
    def json_of(cls, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """The view of rows that were made here; see `TaskView.json_of`."""
        return b'{"items":[%s]}' % b",".join(TaskView.json_of(row) for row in rows)


class TypeView(BaseModel):
    """A task type as its worker has announced it."""

    type: str
    service: str
    kind: str
    version: int
    title: str
    description: str
    payload_schema: dict[str, Any]
    max_attempts: int | None
    queue: str
    announced_at: Utc


class TypeList(BaseModel):
    items: list[TypeView]


class Placed(Protocol):
    """What has a place in a list."""

    @property
    def created_at(self) -> datetime: ...

    @property
    def id(self) -> UUID: ...


def encode_cursor(last: Placed | Row[Any]) -> str:
    """The cursor that leads to what follows the last item of a page."""
    text = json.dumps([last.created_at.astimezone(UTC).isoformat(), str(last.id)], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> Position:
    """Where a cursor points.

    Raises:
        ValueError: It is none of ours.
    """
    padded = cursor + "=" * (-len(cursor) % 4)
    match json.loads(base64.urlsafe_b64decode(padded)):
        case [str(moment), str(identity)]:
            created_at = datetime.fromisoformat(moment)
            if created_at.tzinfo is not None:
                return Position(created_at, UUID(identity))
    raise ValueError("not a cursor")
