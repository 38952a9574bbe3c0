"""What travels over HTTP of dead letters: requests as they are read, answers as they are shown."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from gateway.dead_letters.listing import Filter, LetterState
from gateway.problems import FieldError, Problem
from gateway.schemas import TaskView, TypeName, Utc
from taskmesh.contracts.lifecycle import TaskState

MOST_AT_ONCE: Final = 10_000

Word = Annotated[str, Field(max_length=255, pattern=r"^[^\x00]*$")]


class LetterFilter(BaseModel):
    """Which dead letters are meant; what is left out does not narrow the choice."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    service: Word | None = None
    """The service whose queue it died in."""
    type: Word | None = None
    reason: Word | None = None
    """The broker's word: `rejected`, `delivery_limit`, `expired`, `maxlen`; or `malformed` from the projector."""
    code: Word | None = None
    """What is wrong with it, such as `malformed`, `unknown_task`, `contract_violation` or `poison`."""
    task_id: UUID | None = None
    fingerprint: Word | None = None
    """The same for letters that died of the same thing; see `GET /v1/dead-letters/groups`."""
    since: Utc | None = None
    """Stored at or after."""
    until: Utc | None = None
    """Stored before."""

    def chosen(self, state: LetterState | None) -> Filter:
        """What will be looked for."""
        names = ("service", "type", "reason", "code", "task_id", "fingerprint", "since", "until")
        return Filter(state=state, **{name: getattr(self, name) for name in names})


class LetterQuery(LetterFilter):
    """Filters of a list of dead letters, and which page of it."""

    state: LetterState | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = None

    def before(self) -> int | None:
        """Where the page before ended."""
        if self.cursor is None:
            return None
        try:
            return decode_cursor(self.cursor)
        except ValueError as error:
            fault = FieldError(pointer="/query:cursor", detail="is not a cursor of this gateway")
            raise Problem("invalid_request", "the cursor cannot be read", errors=[fault]) from error


class GroupQuery(LetterFilter):
    """Filters of groups of dead letters."""

    state: LetterState | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class LetterView(BaseModel):
    """A dead letter in a list: nothing of its body or headers. Times are RFC 3339 in UTC."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    id: int
    state: LetterState
    service: str | None
    queue: str
    """Where it died."""
    type: str | None
    task_id: UUID | None
    """Null if it has no id that can be read."""
    reason: str
    code: str | None
    error: str | None
    """One sentence; names places and limits, never a value of the payload."""
    exception: str | None
    error_fingerprint: str | None
    attempt: int | None
    trace_id: str | None
    size: int
    """Bytes of the body."""
    died_at: Utc | None
    """By the broker's clock, to the second."""
    received_at: Utc
    resolved_at: Utc | None
    resolved_by: UUID | None
    """The API key."""
    resolution_note: str | None
    replay_task_id: UUID | None


class LetterPage(BaseModel):
    """One page of dead letters, the newest first."""

    items: list[LetterView]
    next_cursor: str | None = None


class LetterGroup(BaseModel):
    """Dead letters that died of the same thing."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    fingerprint: str | None
    count: int
    first_at: Utc
    last_at: Utc
    sample_id: int
    """The newest letter of the group."""
    service: str | None
    type: str | None
    reason: str
    code: str | None
    error: str | None
    exception: str | None


class LetterGroups(BaseModel):
    """Groups of dead letters, the largest first."""

    items: list[LetterGroup]


class Attempt(BaseModel):
    """One step in the timeline of the letter's task."""

    model_config = ConfigDict(from_attributes=True)

    seq: int
    state: TaskState
    attempt: int
    at: Utc
    detail: dict[str, Any] | None


class BodyView(BaseModel):
    """A message's body: as text if it is UTF-8, else in base64."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text: str | None = None
    base64: str | None = None
    truncated: bool
    """True if only the first mebibyte is shown."""

    @classmethod
    def of(cls, body: bytes, size: int) -> BodyView:
        """The view of a body of which perhaps only the beginning was read."""
        truncated = len(body) < size
        try:
            return cls(text=body.decode(), truncated=truncated)
        except UnicodeDecodeError:
            return cls(base64=base64.b64encode(body).decode(), truncated=truncated)


class LetterDetail(LetterView):
    """A dead letter with all that is known of it."""

    exchange: str
    routing_key: str
    headers: dict[str, Any]
    """As they came; what is no JSON is shown as text, and what is too long or too deep is cut."""
    properties: dict[str, Any]
    body: BodyView
    history: list[Attempt]
    """What the ledger knows of its task, the oldest first."""
    task_url: str | None


class ReplayRequest(BaseModel):
    """How a dead letter is to be changed before it is sent again."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    payload: dict[str, Any] | None = None
    """Instead of the letter's own; what the type's JSON Schema asks for."""
    type: TypeName | None = None
    """Of a letter that cannot be read."""


class ReplayView(BaseModel):
    """A letter that was sent again, and the task that it is by now; null for a message that is no task."""

    letter: LetterView
    task: TaskView | None


class DiscardRequest(BaseModel):
    """Why a letter is put away."""

    model_config = ConfigDict(extra="forbid")

    note: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] | None = None


class BulkReplayRequest(BaseModel):
    """Which open letters are to be sent again, and how fast; the oldest first."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    filter: LetterFilter
    rate_per_second: Annotated[float, Field(ge=0.0001, le=10_000, allow_inf_nan=False)] | None = None
    """Tasks become due one after the other at this rate; without it, all at once."""
    dry_run: bool = False
    """Only say what would be done."""
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = MOST_AT_ONCE


class Reason(BaseModel):
    """Why some letters cannot be sent again."""

    code: str
    count: int
    sample_id: int
    detail: str


class BulkReplayView(BaseModel):
    """What a bulk replay has done, or would do."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    dry_run: bool
    matched: int
    """Open letters that the filter means, all of them."""
    replayed: int
    """Letters that were sent again, or would be."""
    refused: int
    """Letters that cannot be sent again; they stay open."""
    reasons: list[Reason]
    first_due_at: Utc | None
    last_due_at: Utc | None


class BulkDiscardRequest(DiscardRequest):
    """Which open letters are to be put away; the oldest first."""

    filter: LetterFilter
    dry_run: bool = False
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = MOST_AT_ONCE


class BulkDiscardView(BaseModel):
    """What a bulk discard has done, or would do."""

    dry_run: bool
    matched: int
    discarded: int


def encode_cursor(letter_id: int) -> str:
    """The cursor that leads to what follows a letter in a list."""
    return base64.urlsafe_b64encode(json.dumps([letter_id]).encode()).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> int:
    """The letter that a cursor points at.

    Raises:
        ValueError: It is none of ours.
    """
    match json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))):
        case [int(letter_id)] if 0 < letter_id < 2**63:
            return letter_id
    raise ValueError("not a cursor")
