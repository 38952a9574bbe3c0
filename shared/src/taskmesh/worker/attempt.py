"""One delivery of one task, from its claim to its committed outcome.

Every way out of an attempt is one of: committed and acknowledged; put back to the queue; dead-lettered. The order is
always commit, then acknowledge, so a crash between the two brings a delivery that the inbox recognises.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from celery.canvas import maybe_signature
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from taskmesh import celery_protocol, exchanges, inbox, lifecycle, logs, outbox, traces
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.database import is_unavailable
from taskmesh.errors import ContractViolation, PermanentError, TaskCancelled
from taskmesh.inbox import InboxState
from taskmesh.outbox import OutboxMessage
from taskmesh.traces import Relation
from taskmesh.worker import unit as units
from taskmesh.worker.failures import Poison, describe, describe_violation, qualified_name
from taskmesh.worker.reports import started
from taskmesh.worker.spans import AttemptSpan
from taskmesh.worker.unit import AlreadySettled, Key, Unit
from taskmesh.worker.values import PAYLOAD_MAX_BYTES, bounded, celery_payload, plain

if TYPE_CHECKING:
    from taskmesh.worker.task import MeshTask

logger = logging.getLogger(__name__)

WORKER_NAME = socket.gethostname()

# A rerun costs nothing at the broker, while every requeue counts towards the queue's delivery limit: so an attempt
# that lost its database waits for it here, until its soft time limit, before it gives the message back.
RERUNS = 25
RERUN_WAIT_MAX_SECONDS = 30.0

WORKER_LOST = "worker_lost"
"""Why a task is tried again whose attempt came to no end."""

# How often the worker of a task without a limit of its own may be lost before the task is called poison.
LOSSES_MAX = 10


class Settled(Ignore):  # type: ignore[misc]  # Celery has no types
    """The outcome is committed: acknowledge, and do nothing more."""


class Attempt:
    """Runs a task once and settles what becomes of it."""

    def __init__(self, task: MeshTask, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        request = task.request
        self.task = task
        self.request = request
        self.args = args
        self.kwargs = kwargs
        self.headers: Mapping[str, Any] = request.headers or {}
        self.task_id = UUID(request.id)
        self.sequence = celery_protocol.sequence(request.replaced_task_nesting or 0, request.retries or 0)
        self.kind = TaskKind(self.headers.get(celery_protocol.KIND_HEADER, TaskKind.COMMAND))
        self.expires_at = _time(self.headers.get(celery_protocol.EXPIRES_HEADER))
        self.due_at = _time(self.headers.get(celery_protocol.ETA_HEADER))
        self.redeliveries = int(self.headers.get("x-delivery-count") or 0)
        self.started_at = datetime.now(UTC)
        self.worker = f"{WORKER_NAME}:{os.getpid()}"
        self.retries: int = request.retries or 0
        # Of this task, this one included; 0 until the inbox has counted it.
        self.starts = 0
        # What the delivery has come to, and the class of the error that it met; for spans and metrics.
        self.outcome: str | None = None
        self.error_type: str | None = None

    def run(self) -> Any:
        """Run the task and commit its outcome.

        Returns:
            What the task returned.

        Raises:
            Ignore: The outcome is committed, or there is nothing to do: acknowledge.
            Reject: Give the message back to the queue, or to the dead letters.
        """
        facts = {"task_id": str(self.task_id), "type": self.task.name, "attempt": self.attempt}
        with logs.facts(**facts), self._span() as span:
            try:
                result = self._run(span)
            except (Ignore, Reject):
                raise
            except SoftTimeLimitExceeded as error:
                # Not in the task's own code, but while its attempt waited for the database or for another delivery.
                self._mark(span, error)
                logger.warning("message given back: the soft time limit has come while its attempt waited")
                raise Reject(error, requeue=True) from error
            except Exception as error:
                self._mark(span, error)
                logger.exception("attempt could not be settled")
                raise Reject(error, requeue=True) from error
        # They have left with the commit; Celery would send them again.
        self.request.callbacks = self.request.chain = None
        return result

    @property
    def attempt(self) -> int:
        """Counts starts from 1, those that were lost included."""
        return self.starts or self.retries + 1

    @property
    def losses(self) -> int:
        """How many earlier starts came to no end: their worker was killed, or ran out of memory or time."""
        return max(0, self.starts - 1 - self.retries)

    def _run(self, span: AttemptSpan) -> Any:
        """Run the task, and again each time that its database was lost."""
        for rerun in range(RERUNS):
            try:
                return self._settled(span)
            except Exception as error:
                if not is_unavailable(error):
                    raise
                logger.warning("database unavailable; attempt waits", extra={"rerun": rerun})
            self.task.app.dispose_connections()
            time.sleep(min(RERUN_WAIT_MAX_SECONDS, 0.1 * 2**rerun) * random.uniform(0.5, 1))  # noqa: S311
        span.fail("database_unavailable", "database_unavailable")
        raise Reject("database unavailable", requeue=True)

    def _settled(self, span: AttemptSpan) -> Any:
        unit = Unit(Key(self.task_id, self.sequence), self.task.app.connect)
        with units.running(unit), self._alone():
            try:
                self._check_in(unit)
            except AlreadySettled:
                self._skip(span)
            except TaskCancelled:
                with logs.facts(attempt=self.attempt):
                    self._cancel(unit, span)
            except Poison as error:
                with logs.facts(attempt=self.attempt):
                    self._fail(unit, error, span, park=True)
            span.set("taskmesh.task.attempt", self.attempt)
            if self.attempt > 1:
                span.set("taskmesh.retry.reason", self._retry_reason())
            with logs.facts(attempt=self.attempt):
                return self._execute(unit, span)

    def _execute(self, unit: Unit, span: AttemptSpan) -> Any:
        arguments, keywords = self._begin(unit, span)
        try:
            result = self.task.run(*arguments, **keywords)
            self._follow(unit, result)
        except AlreadySettled:
            self._skip(span)
        except TaskCancelled:
            self._cancel(unit, span)
        except (Ignore, Retry, Reject) as outcome:
            self._settle_outcome(unit, outcome, span)
        except Exception as error:
            if is_unavailable(error):
                raise
            self._fail(unit, error, span)
        return self._succeed(unit, result, span)

    def _begin(self, unit: Unit, span: AttemptSpan) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Claim a task that runs in its transaction; returns what it is called with."""
        try:
            if self.task.transaction_mode == "whole":
                unit.open(unless_cancelled=True)
            return self._arguments()
        except AlreadySettled:
            self._skip(span)
        except TaskCancelled:
            self._cancel(unit, span)
        except ContractViolation as error:
            self._fail(unit, error, span, park=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other deliveries of the task waiting; in transaction mode "whole" the inbox row's lock does."""
        if self.task.transaction_mode == "whole":
            yield
            return
        session = self.task.app.sessions()
        try:
            inbox.wait_alone(session, self.task_id)
            yield
        finally:
            units.give_up(session)

    def _skip(self, span: AttemptSpan) -> NoReturn:
        self._tell(span, "duplicate")
        with self.task.app.autocommit() as connection:
            if inbox.is_parked(connection, self.task_id, self.sequence):
                # The process died after its commit, and before the broker was told.
                logger.warning("message parked: its task has failed, and it had not come to the dead letters")
                raise Reject("parked", requeue=False)
        logger.info("delivery skipped: the attempt is settled already", extra={"redeliveries": self.redeliveries})
        raise Settled

    def _check_in(self, unit: Unit) -> None:
        """Count the start, and settle at once what is not to be run.

        Raises:
            AlreadySettled: The task is finished, or a later attempt is under way.
            TaskCancelled: Somebody wants it cancelled, and its claim will not tell.
            Poison: Its worker was lost, and no attempt is left.
        """
        if self.due_at and self.due_at > datetime.now(UTC):
            self._defer(unit)
        if self.expires_at and self.expires_at <= datetime.now(UTC):
            unit.settle_without_effect(InboxState.EXPIRED, [self._report(TaskState.EXPIRED)])
            logger.info("task expired")
            raise Settled
        with self.task.app.autocommit() as connection:
            starts = inbox.check_in(connection, self.task_id, self.sequence, self.worker, again=self.starts > 0)
            self.starts = starts or self.starts
            # Most attempts learn it from their claim, which comes next.
            asks = starts is not None and (self.losses > 0 or self.task.transaction_mode == "last")
            is_cancelled = asks and inbox.is_cancelled(connection, self.task_id)
        if starts is None:
            raise AlreadySettled
        if is_cancelled:
            raise TaskCancelled(units.NOT_BEGUN)
        if self.losses and self._spent(self.starts - 1):
            losses = self.losses
            # This delivery runs nothing, so it is not told as an attempt.
            self.starts -= 1
            raise Poison(
                f"started {self.starts} times, and {losses} times without an end: the task kills its worker,"
                " uses up its memory or its time, or the worker was killed; no attempt is left"
            )

    def _retry_reason(self) -> str:
        """The code of what the attempt before came to."""
        if self.redeliveries and self.losses:
            return WORKER_LOST
        reason = self.headers.get(celery_protocol.RETRY_REASON_HEADER)
        return reason if isinstance(reason, str) else "unknown"

    def _spent(self, starts: int) -> bool:
        """True if no attempt is left after so many starts."""
        if self.task.max_retries is None:
            return self.losses >= LOSSES_MAX
        # A task may have granted itself more retries than it was declared with: then only losses count.
        spent = starts if self.retries <= self.task.max_retries else self.losses
        return spent > self.task.max_retries

    def _defer(self, unit: Unit) -> NoReturn:
        """Move a task that plain Celery published with an `eta` out of the worker and into the outbox."""
        assert self.due_at is not None
        # The delivery to come has this attempt's own sequence, so what is recorded is the one before it.
        unit.key = Key(self.task_id, self.sequence - 1)
        unit.settle_without_effect(
            InboxState.WAITING,
            [self.task.redelivery(due_at=self.due_at), self._report(TaskState.SCHEDULED, due_at=self.due_at)],
        )
        self._end_if_cancelled()
        raise Settled

    def _arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """What the function is called with.

        Raises:
            ContractViolation: The payload does not fit the task's contract.
        """
        contract = self.task.contract
        if contract is None:
            return self.args, self.kwargs
        payload = celery_payload(self.args, self.kwargs)
        try:
            return (contract.model_validate(payload),), {}
        except ValidationError as error:
            raise ContractViolation(describe_violation(error)) from error

    def _follow(self, unit: Unit, result: Any) -> None:
        """Send `link` and `chain` now, inside the transaction, and not after it as Celery would."""
        request = self.request
        if self._own(unit.messages):
            # `retry(throw=False)`: they went along with it, and wait for the task's end.
            return
        for callback in request.callbacks or ():
            signature = maybe_signature(callback, app=self.task.app)
            signature.apply_async((plain(result),), parent_id=request.id, root_id=request.root_id)
        if request.chain:
            rest = list(request.chain)
            following = maybe_signature(rest.pop(), app=self.task.app)
            following.apply_async((plain(result),), chain=rest, parent_id=request.id, root_id=request.root_id)

    def _succeed(self, unit: Unit, result: Any, span: AttemptSpan) -> Any:
        value = plain(result)
        try:
            bounded(value)
        except (TypeError, ValueError) as error:
            self._fail(unit, error, span)
        try:
            state = self._settle_success(unit, value)
        except SQLAlchemyError as error:
            if is_unavailable(error):
                raise
            # What the task left to be flushed, or a constraint that is checked at the commit: the effect was refused.
            self._fail(unit, error, span)
        self._tell(span, state)
        if state == TaskState.SUCCEEDED:
            logger.info("task succeeded")
        else:
            logger.info("task continues in a later attempt")
        return value

    def _settle_success(self, unit: Unit, result: Any) -> str:
        onward = self._own(unit.messages)
        children = self._children(unit.messages)
        try:
            if onward is None:
                report = self._report(TaskState.SUCCEEDED, result=result, children=children)
                unit.settle(InboxState.SUCCEEDED, [*unit.messages, report])
                return TaskState.SUCCEEDED
            # `retry(throw=False)` or `replace()`: the task goes on under the same id, and this attempt's work counts.
            report = self._report(TaskState.RETRYING, due_at=onward.due_at, children=children)
            nesting = self.request.replaced_task_nesting or 0
            replaced = (onward.headers.get("replaced_task_nesting") or 0) > nesting
            unit.settle(InboxState.WAITING, [*unit.messages, report], replaced=replaced)
        except AlreadySettled:
            logger.info("outcome dropped: another delivery has settled the attempt")
            raise Settled from None
        self._end_if_cancelled()
        return TaskState.RETRYING

    def _settle_outcome(self, unit: Unit, outcome: BaseException, span: AttemptSpan) -> NoReturn:
        """What Celery's own control exceptions mean."""
        if isinstance(outcome, Retry):
            self._retry(unit, outcome, span)
        if isinstance(outcome, Reject):
            if isinstance(outcome.reason, SoftTimeLimitExceeded):
                # It came while `retry` wrote the next attempt, and Celery takes that for a reason to park the message.
                raise outcome.reason
            self._tell(span, "rejected")
            if outcome.requeue:
                raise outcome
            reason = outcome.reason
            if not isinstance(reason, BaseException):
                reason = PermanentError("the task has rejected its message")
            self._fail(unit, reason, span, park=True)
        if isinstance(outcome, Settled):
            raise outcome
        # `replace()` has sent its message and raises Ignore; a bare Ignore means: done, with nothing to tell.
        self._succeed(unit, None, span)
        raise Settled

    def _retry(self, unit: Unit, outcome: Retry, span: AttemptSpan) -> NoReturn:
        onward = self._own(unit.messages)
        if onward is None:
            self._fail(unit, RuntimeError("Retry was raised by hand; call self.retry()"), span)
        cause = outcome.exc if isinstance(outcome.exc, BaseException) else None
        if self.losses and self._spent(self.starts):
            self._fail(unit, cause or Poison("its worker was lost before, and no attempt is left"), span)
        failure = describe(cause) if cause else TaskFailure(code="retry", message="the task asked for a retry")
        due_at = _no_sooner(onward.due_at, cause)
        onward = _tried_again(onward, due_at, reason=failure.code)
        report = self._report(TaskState.RETRYING, due_at=due_at, failure=failure)
        try:
            unit.settle_without_effect(InboxState.WAITING, [onward, report])
        except AlreadySettled:
            self._skip(span)
        self._mark(span, cause or outcome)
        self._tell(span, "retrying")
        logger.warning("attempt failed; task will be retried", extra={"code": failure.code, "due_at": due_at})
        self._end_if_cancelled()
        self._call(self.task.on_retry, outcome)
        raise Settled

    def _end_if_cancelled(self) -> None:
        """End the task here if somebody wants it cancelled: its next attempt may be due in an hour.

        Asked after the commit that lets the next attempt wait: a cancellation that arrives later finds it waiting.
        """
        with self.task.app.sessions() as session:
            if inbox.is_cancelled(session, self.task_id) and inbox.settle_retry_cancelled(session, self.task_id):
                outbox.put(session.connection(), [self._report(TaskState.CANCELLED)])
                session.may_commit = True
                session.commit()
                logger.info("task cancelled")

    def _cancel(self, unit: Unit, span: AttemptSpan) -> NoReturn:
        unit.messages.clear()
        try:
            unit.settle_without_effect(InboxState.CANCELLED, [self._report(TaskState.CANCELLED)])
        except AlreadySettled:
            self._skip(span)
        self._tell(span, "cancelled")
        logger.info("task cancelled")
        raise Settled

    def _fail(self, unit: Unit, error: BaseException, span: AttemptSpan, *, park: bool = False) -> NoReturn:
        """End the task; with `park` its message goes to the dead letters, where a person sees it as it came."""
        unit.messages.clear()
        self._send_errbacks()
        failure = describe(error)
        children = self._children(unit.messages)
        report = self._report(TaskState.FAILED, failure=failure, children=children, payload=self._payload())
        try:
            unit.settle_without_effect(InboxState.FAILED, [*unit.messages, report], parked=park)
        except AlreadySettled:
            self._skip(span)
        self._mark(span, error)
        self._tell(span, "dead-lettered" if park else "failed")
        logger.error("task failed", exc_info=error, extra={"code": failure.code, "losses": self.losses})
        self._call(self.task.on_failure, error)
        if park:
            raise Reject(error, requeue=False)
        raise Settled

    def _payload(self) -> dict[str, Any] | None:
        """What the task was asked to do, if it can be asked again: the gateway has not seen what services send."""
        try:
            payload = dict(celery_payload(self.args, self.kwargs))
            bounded(payload, PAYLOAD_MAX_BYTES)
        except (ContractViolation, TypeError, ValueError):
            return None
        return payload

    def _call(self, hook: Callable[..., Any], error: BaseException) -> None:
        """Tell the task's own hook of an outcome, which stands whatever the hook does."""
        try:
            hook(error, self.request.id, self.args, self.kwargs, None)
        except Exception:
            logger.exception("hook failed", extra={"hook": hook.__name__})

    def _send_errbacks(self) -> None:
        """Send `link_error` with the failure, not after it: Celery would do so from a process that may be gone."""
        for errback in self.request.errbacks or ():
            try:
                signature = maybe_signature(errback, app=self.task.app)
                signature.apply_async((self.request.id,), parent_id=self.request.id, root_id=self.request.root_id)
            except Exception:
                # Whatever its sender made of it, the failure must be told.
                logger.exception("link_error could not be sent")

    def _own(self, messages: list[OutboxMessage]) -> OutboxMessage | None:
        """The message that carries this same task on, if the task sent one."""
        return next((message for message in messages if message.task_id == self.task_id), None)

    def _children(self, messages: list[OutboxMessage]) -> tuple[LifecycleEvent, ...]:
        """What this task has started, for the ledger: a caller sees the whole tree at once."""
        service = self.task.app.service
        return tuple(
            started(message, service)
            for message in messages
            if message.task_id is not None and message.task_id != self.task_id
        )

    def _report(
        self,
        state: TaskState,
        *,
        due_at: datetime | None = None,
        result: Any = None,
        failure: TaskFailure | None = None,
        children: tuple[LifecycleEvent, ...] = (),
        payload: dict[str, Any] | None = None,
    ) -> OutboxMessage:
        return lifecycle.message(
            LifecycleEvent(
                task_id=self.task_id,
                type=self.task.name,
                state=state,
                at=datetime.now(UTC),
                service=self.task.app.service,
                kind=self.kind,
                sequence=self.sequence,
                attempt=self.attempt,
                root_id=_uuid(self.request.root_id),
                parent_id=_uuid(self.request.parent_id),
                event_id=_uuid(self.headers.get(celery_protocol.EVENT_ID_HEADER)),
                traceparent=self.headers.get("traceparent"),
                due_at=due_at,
                expires_at=self.expires_at,
                started_at=self.started_at,
                worker=self.worker,
                result=result,
                failure=failure,
                payload=payload,
                children=children,
            )
        )

    def _span(self) -> AttemptSpan:
        delivery = self.request.delivery_info or {}
        exchange, routing_key = delivery.get("exchange") or "", delivery.get("routing_key") or ""
        queue = exchanges.queue_of(self.task.app.service, self.kind)
        attributes: dict[str, Any] = {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": f"{exchange}:{routing_key}:{queue}",
            "messaging.rabbitmq.destination.routing_key": routing_key,
            "messaging.message.id": self.request.id,
            "taskmesh.task.id": str(self.task_id),
            "taskmesh.task.type": self.task.name,
            "taskmesh.task.attempt": self.attempt,
            "taskmesh.task.redeliveries": self.redeliveries,
        }
        slow_seconds = self.task.app.settings.slow_task_seconds
        return AttemptSpan(self.task.name, self.headers, attributes, slow_seconds=slow_seconds)

    def _mark(self, span: AttemptSpan, error: BaseException) -> None:
        self.error_type = qualified_name(error)
        span.fail(describe(error).code, self.error_type)

    def _tell(self, span: AttemptSpan, outcome: str) -> None:
        self.outcome = outcome
        span.set("taskmesh.outcome", outcome)


def _no_sooner(due_at: datetime | None, cause: BaseException | None) -> datetime | None:
    """The retry's time, put off when the error itself says how long to wait."""
    wait: timedelta | None = getattr(cause, "retry_after", None)
    if not isinstance(wait, timedelta):
        return due_at
    earliest = datetime.now(UTC) + wait
    return max(due_at, earliest) if due_at else earliest


def _tried_again(message: OutboxMessage, due_at: datetime | None, *, reason: str) -> OutboxMessage:
    """The message of the next attempt, in this one's trace unless it has to wait for long."""
    headers = {**message.headers, celery_protocol.RETRY_REASON_HEADER: reason}
    if due_at is not None and due_at - datetime.now(UTC) > traces.LONGEST_WAIT_IN_TRACE:
        headers |= traces.beginning(Relation.RETRIED).headers()
    return replace(message, headers=headers, due_at=due_at)


def _time(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else None


def _uuid(value: Any) -> UUID | None:
    return UUID(value) if isinstance(value, str) else None
