"""The messages of this service: one row for each, whose state says what has been tried and what is known.

    composed -> claimed -> in_data -> accepted
                   |          |----> deferred   -> claimed ...        (an attempt is over; the next is due)
                   |          |----> ambiguous  -> claimed, once      (nobody knows whether the relay has it)
                   |          `----> failed
                   `-> deferred, failed                               composed, deferred -> suppressed

`claimed` is committed before connecting, `in_data` before the content is sent. So after a crash a claimed message is
certainly unsent, and one in data is not certainly anything. `attempt` fences: an attempt that was overtaken finds
that it is no longer the message's latest, and stops before it sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Column,
    DateTime,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    exists,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from email_worker.replies import Reply

metadata = MetaData()


class MessageState(StrEnum):
    COMPOSED = "composed"
    CLAIMED = "claimed"
    IN_DATA = "in_data"
    DEFERRED = "deferred"
    AMBIGUOUS = "ambiguous"
    ACCEPTED = "accepted"
    SUPPRESSED = "suppressed"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        return self in {MessageState.ACCEPTED, MessageState.SUPPRESSED, MessageState.FAILED}


messages = Table(
    "messages",
    metadata,
    # The id of the task that asked for the mail, so that a redelivery of the task finds it.
    Column("id", Uuid, primary_key=True),
    Column("template", Text, nullable=False),
    Column("to_address", Text, nullable=False),
    Column("header_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("deferrals", Integer, nullable=False, server_default="0"),
    Column("resends", Integer, nullable=False, server_default="0"),
    # No attempt may begin before: the lease of one that is in data, the rest of one that was put off.
    Column("not_before", DateTime(timezone=True), nullable=True),
    Column("reason", Text, nullable=True),
    Column("last_code", Integer, nullable=True),
    Column("last_text", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# Apart from its message, so that contents can be purged by their age without touching what is known of the delivery.
contents = Table(
    "message_contents",
    metadata,
    Column("message_id", Uuid, ForeignKey(messages.c.id, ondelete="CASCADE"), primary_key=True),
    Column("mime", LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessage:
    """A composed mail on its way into the table."""

    id: UUID
    template: str
    to_address: str
    header_id: str
    created_at: datetime
    mime: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message as its row says, read under its lock; `now` is the database's clock at that moment."""

    id: UUID
    to_address: str
    header_id: str
    state: MessageState
    attempt: int
    deferrals: int
    resends: int
    not_before: datetime | None
    reason: str | None
    last_code: int | None
    created_at: datetime
    now: datetime


def is_stored(session: Session, message_id: UUID) -> bool:
    """True if the message has been composed already."""
    return bool(session.execute(select(exists().where(messages.c.id == message_id))).scalar_one())


def store(session: Session, message: NewMessage) -> None:
    """Keep the message and its bytes; of two concurrent compositions the first to commit stays, whole."""
    stored = session.execute(
        insert(messages)
        .values(
            id=message.id,
            template=message.template,
            to_address=message.to_address,
            header_id=message.header_id,
            state=MessageState.COMPOSED.value,
            created_at=message.created_at,
        )
        .on_conflict_do_nothing()
        .returning(messages.c.id)
    ).one_or_none()
    if stored:
        session.execute(insert(contents).values(message_id=message.id, mime=message.mime))


def lock(session: Session, message_id: UUID) -> Message:
    """Read the message and keep others from changing it until the caller commits."""
    columns = [messages.c[name] for name in Message.__slots__ if name != "now"]
    statement = select(*columns, func.clock_timestamp().label("now")).where(messages.c.id == message_id)
    row = session.execute(statement.with_for_update()).one()
    return Message(**{**row._asdict(), "state": MessageState(row.state)})


def mime_of(session: Session, message_id: UUID) -> bytes:
    """The bytes of the mail, the same for every attempt."""
    return bytes(session.execute(select(contents.c.mime).where(contents.c.message_id == message_id)).scalar_one())


def claim(session: Session, message: Message, *, is_resend: bool) -> int:
    """Begin the next attempt of a locked message, and return its number."""
    attempt = message.attempt + 1
    _change(
        session,
        message.id,
        state=MessageState.CLAIMED,
        attempt=attempt,
        resends=message.resends + is_resend,
        not_before=None,
    )
    return attempt


def enter_data(session: Session, message_id: UUID, attempt: int, *, lease: timedelta) -> bool:
    """Say that the content is about to be sent; False if the attempt was overtaken and must not send.

    Args:
        session: The caller's transaction.
        message_id: Which message.
        attempt: The number that `claim` returned.
        lease: How long others leave the message alone; longer than the wait for the relay's answer.
    """
    statement = (
        update(messages)
        .where(
            messages.c.id == message_id,
            messages.c.attempt == attempt,
            messages.c.state == MessageState.CLAIMED.value,
        )
        .values(state=MessageState.IN_DATA.value, not_before=func.clock_timestamp() + lease, updated_at=func.now())
        .returning(messages.c.id)
    )
    return session.execute(statement).one_or_none() is not None


def accept(session: Session, message: Message, reply: Reply) -> None:
    """The relay has the message; this is never undone."""
    _change(session, message.id, state=MessageState.ACCEPTED, not_before=None, reason=None, **_reply(reply))


def defer(session: Session, message: Message, reply: Reply, *, wait: timedelta) -> None:
    """The relay does not have the message, and is to be asked again after `wait`."""
    _change(
        session,
        message.id,
        state=MessageState.DEFERRED,
        deferrals=message.deferrals + 1,
        not_before=func.clock_timestamp() + wait,
        **_reply(reply),
    )


def doubt(session: Session, message: Message, reply: Reply, *, wait: timedelta) -> None:
    """Nobody knows whether the relay has the message; it rests for `wait`."""
    _change(
        session,
        message.id,
        state=MessageState.AMBIGUOUS,
        not_before=func.clock_timestamp() + wait,
        **_reply(reply),
    )


def fail(session: Session, message: Message, reply: Reply | None, *, reason: str) -> None:
    """The message will not be tried again."""
    facts = _reply(reply) if reply else {}
    _change(session, message.id, state=MessageState.FAILED, reason=reason, not_before=None, **facts)


def suppress(session: Session, message: Message) -> None:
    """The message is not sent, because its recipient must not be mailed."""
    _change(session, message.id, state=MessageState.SUPPRESSED, not_before=None)


def _change(session: Session, message_id: UUID, *, state: MessageState, **values: Any) -> None:
    session.execute(
        update(messages).where(messages.c.id == message_id).values(state=state.value, updated_at=func.now(), **values)
    )


def _reply(reply: Reply) -> dict[str, Any]:
    return {"last_code": reply.code, "last_text": reply.text[:500].replace("\x00", "")}
