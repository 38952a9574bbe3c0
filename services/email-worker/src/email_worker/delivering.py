"""Delivering one message: the steps, and what is committed between them.

    compose, store -> claim -> [the relay agrees to take it] -> enter data -> [content, reply] -> record

Each arrow is a commit. No database transaction is open while the relay is talked to, and whatever kills the process
between two steps, the next delivery of the task goes on from the row (see `messages`).

What is promised: the relay takes the message at least once; and at most once, unless the connection ends between the
last byte of the content and the relay's reply. Nobody can know then (RFC 1047). RFC 5321 prefers a second copy to none,
so the message is sent once more after a rest, with the same bytes and the same Message-ID, and never a third time.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Protocol, TypedDict, assert_never
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from email_worker import messages, suppressions
from email_worker.composing import Composer, Mail
from email_worker.mailer import Envelope, Mailer
from email_worker.messages import Message, MessageState
from email_worker.replies import Outcome, Reply
from taskmesh.contracts import Event
from taskmesh.contracts.email import MessageAccepted, MessageFailed
from taskmesh.database import is_unavailable
from taskmesh.errors import DatabaseUnavailable, PermanentError, TransientError

logger = logging.getLogger(__name__)

DEFERRALS = tuple(timedelta(minutes=minutes) for minutes in (1, 5, 15, 30, 60, 120, 240))
"""How long to wait after the first, second, ... deferral; the last one repeats."""

JITTER = 0.1

GIVE_UP_AFTER = timedelta(hours=72)
"""RFC 5321 4.5.4.1 asks for four to five days; a bill that is three days late should rather be noticed."""

MAX_RESENDS = 1

RECORD_WAITS_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, *(10,) * 15)


class NotDelivered(PermanentError):
    """The message was refused for good, or given up; the text says by which reply."""

    code: ClassVar[str] = "not_delivered"


class HardBounce(NotDelivered):
    """The mailbox does not exist; the address is suppressed from now on."""

    code = "hard_bounce"


class SenderRefused(NotDelivered):
    """The relay does not take mail from us: policy, reputation or authentication. Mend it, then send again."""

    code = "sender_refused"


class TooBig(NotDelivered):
    """The relay does not take a mail of this size."""

    code = "too_big"


class ContentRefused(NotDelivered):
    """The relay does not take this content."""

    code = "content_refused"


class Refused(NotDelivered):
    """The relay refused for good, for another reason."""

    code = "refused"


class GaveUp(NotDelivered):
    """The relay put the message off until it was given up."""

    code = "gave_up"


class Ambiguous(NotDelivered):
    """The relay may have the message once, twice or not at all; a person has to ask the recipient."""

    code = "ambiguous"


FAILURES = {
    failure.code: failure for failure in (HardBounce, SenderRefused, TooBig, ContentRefused, Refused, GaveUp, Ambiguous)
}


class Overtaken(Exception):
    """A later attempt has begun; this one must not send."""


class Delivered(TypedDict):
    """What the ledger keeps as the task's result."""

    message_id: str
    outcome: str
    """`accepted` or `suppressed`."""


class RunningTask(Protocol):
    """The part of `MeshTask` that a delivery needs."""

    @property
    def task_id(self) -> UUID:
        """Becomes the message's id."""

    def transaction(self) -> AbstractContextManager[Session]:
        """A short transaction, committed at the end of the block."""

    def emit(self, event: Event, *, session: Session | None = None) -> UUID:
        """Publish the event with the session's commit."""

    def raise_if_cancelled(self) -> None:
        """Return, unless nobody wants the mail sent any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to send a message now."""

    message: Message
    attempt: int
    mime: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PostOffice:
    """Delivers messages with one mailer; one for each process.

    Attributes:
        resend_after: How long an ambiguous message rests.
    """

    composer: Composer
    mailer: Mailer
    resend_after: timedelta

    def deliver(self, task: RunningTask, mail: Callable[[], Mail]) -> Delivered:
        """Take the task's message as far as it can go now.

        Args:
            task: Whose message it is.
            mail: Writes the mail; called only if the task has no message yet.

        Returns:
            That the relay has taken the message, or that its recipient must not be mailed.

        Raises:
            TransientError: Not yet; the task is to be run again after the error's `retry_after`.
            NotDelivered: Never; recorded, and told as an event.
            PermanentError: The mail cannot be written.
            TaskCancelled: Nobody wants it sent, and this attempt has not sent it.
        """
        self._compose(task, mail)
        task.raise_if_cancelled()
        with task.transaction() as session:
            claim = self._claim(session, task)
        if not isinstance(claim, Claim):
            return _result(claim)
        envelope = Envelope(sender=self.composer.sender.addr_spec, recipient=claim.message.to_address)
        try:
            reply = self.mailer.send(envelope, claim.mime, before_data=lambda: self._enter_data(task, claim))
        except Overtaken:
            raise _not_now(claim.message, None) from None
        self._keep(task, claim, reply)
        return self._answer(task)

    def _compose(self, task: RunningTask, mail: Callable[[], Mail]) -> None:
        with task.transaction() as session:
            if messages.is_stored(session, task.task_id):
                return
        composed = self.composer.compose(mail(), message_id=task.task_id, created_at=datetime.now(UTC))
        with task.transaction() as session:
            messages.store(session, composed)

    def _claim(self, session: Session, task: RunningTask) -> Claim | Message:
        """Claim the message, or return it because there is nothing to send.

        Raises:
            TransientError: It must rest, or another delivery may be sending it.
        """
        message = messages.lock(session, task.task_id)
        if message.state.terminal:
            return message
        if message.not_before and message.not_before > message.now:
            # Most often another delivery is about to hear the reply: look again as soon as the task's backoff says.
            in_data = message.state is MessageState.IN_DATA
            raise _not_now(message, None if in_data else message.not_before - message.now)
        if suppressions.is_suppressed(session, message.to_address):
            messages.suppress(session, message)
            return messages.lock(session, task.task_id)
        # In data after its lease: whoever was sending is gone, and took the answer along.
        is_resend = message.state in {MessageState.IN_DATA, MessageState.AMBIGUOUS}
        if is_resend and message.resends >= MAX_RESENDS:
            _fail(session, task, message, None, Ambiguous.code)
            return messages.lock(session, task.task_id)
        attempt = messages.claim(session, message, is_resend=is_resend)
        return Claim(message=message, attempt=attempt, mime=messages.mime_of(session, message.id))

    def _enter_data(self, task: RunningTask, claim: Claim) -> None:
        # Afterwards the mail may be on its way, and nothing can call it back.
        task.raise_if_cancelled()
        with task.transaction() as session:
            lease = timedelta(seconds=self.mailer.data_seconds)
            if not messages.enter_data(session, claim.message.id, claim.attempt, lease=lease):
                raise Overtaken

    def _keep(self, task: RunningTask, claim: Claim, reply: Reply) -> None:
        """Record the reply even if the database is away for minutes: nobody else knows it, and it comes only once."""
        for wait_seconds in RECORD_WAITS_SECONDS:
            try:
                with task.transaction() as session:
                    self._record(session, task, claim, reply)
            except SQLAlchemyError as error:
                if not is_unavailable(error):
                    raise
                logger.warning("database unavailable; the relay's reply waits to be recorded")
                time.sleep(wait_seconds)
            else:
                return
        raise DatabaseUnavailable("the relay's reply could not be recorded")

    def _record(self, session: Session, task: RunningTask, claim: Claim, reply: Reply) -> None:
        """Write down what the reply means; committed before anything else, so that a redelivery finds it."""
        message = messages.lock(session, claim.message.id)
        facts = {"message_id": str(message.id), "smtp_code": reply.code, "smtp_status": reply.status}
        logger.info("relay answered", extra={**facts, "stage": reply.stage.value, "outcome": reply.outcome.value})
        if reply.is_our_configuration:
            logger.error("relay refused us: mend TASKMESH_SMTP_URL or the relay; the mail waits", extra=facts)
        if reply.outcome is Outcome.ACCEPTED:
            # Even when a later attempt has begun: what the relay has, it has.
            if message.state is not MessageState.ACCEPTED:
                messages.accept(session, message, reply)
                task.emit(MessageAccepted(message_id=message.id), session=session)
            return
        # Overtaken, or recorded by a commit whose confirmation was lost.
        if message.attempt != claim.attempt or message.state not in {MessageState.CLAIMED, MessageState.IN_DATA}:
            return
        match reply.outcome:
            case Outcome.DEFERRED:
                self._defer(session, task, message, reply)
            case Outcome.AMBIGUOUS:
                logger.warning("nobody knows whether the relay has the message", extra=facts)
                messages.doubt(session, message, reply, wait=self.resend_after)
            case Outcome.HARD_BOUNCE:
                suppressions.suppress(session, message.to_address, reason=HardBounce.code, message_id=message.id)
                _fail(session, task, message, reply, HardBounce.code)
            case (Outcome.SENDER_REFUSED | Outcome.TOO_BIG | Outcome.CONTENT_REFUSED | Outcome.REFUSED) as refusal:
                _fail(session, task, message, reply, refusal.value)
            case _:
                assert_never(reply.outcome)

    def _defer(self, session: Session, task: RunningTask, message: Message, reply: Reply) -> None:
        wait = deferral(message.deferrals, hint=reply.wait_hint)
        if message.now + wait > message.created_at + GIVE_UP_AFTER:
            _fail(session, task, message, reply, GaveUp.code)
        else:
            messages.defer(session, message, reply, wait=wait)

    def _answer(self, task: RunningTask) -> Delivered:
        """The task's result by the row alone, so that a redelivery answers as the first delivery would have."""
        with task.transaction() as session:
            message = messages.lock(session, task.task_id)
        if message.state.terminal:
            return _result(message)
        # A message without a time is in the hands of the attempt that overtook this one.
        raise _not_now(message, message.not_before - message.now if message.not_before else None)


def deferral(deferrals: int, *, hint: timedelta | None) -> timedelta:
    """How long to wait after so many deferrals before: our schedule with jitter, or longer if the relay asks for it."""
    wait = DEFERRALS[min(deferrals, len(DEFERRALS) - 1)]
    wait *= random.uniform(1, 1 + JITTER)  # noqa: S311 - spreads load, guards nothing
    return max(wait, hint) if hint else wait


def _fail(session: Session, task: RunningTask, message: Message, reply: Reply | None, reason: str) -> None:
    messages.fail(session, message, reply, reason=reason)
    task.emit(MessageFailed(message_id=message.id, reason=reason), session=session)


def _result(message: Message) -> Delivered:
    if message.state is MessageState.FAILED:
        failure = FAILURES[message.reason or ""]
        raise failure(f"message {message.id} was not delivered: {message.last_code or 'no reply'}")
    return Delivered(message_id=str(message.id), outcome=message.state.value)


def _not_now(message: Message, wait: timedelta | None) -> TransientError:
    code = message.last_code or "no reply"
    return TransientError(f"message {message.id} is {message.state}; last answer: {code}", retry_after=wait)
