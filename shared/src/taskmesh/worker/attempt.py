"""One delivery of one task, from its claim to its committed outcome.

Every way out of an attempt is one of: committed and acknowledged; put back to the queue; dead-lettered. The order is
always commit, then acknowledge, so a crash between the two brings a delivery that the inbox recognises.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn, cast
from uuid import UUID

from celery.canvas import maybe_signature
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry, SoftTimeLimitExceeded
from opentelemetry.trace import Span, SpanKind, StatusCode
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError

from taskmesh import celery_protocol, inbox, lifecycle, logs, outbox, telemetry
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.database import is_unavailable
from taskmesh.errors import ContractViolation, PermanentError, TaskmeshError
from taskmesh.inbox import InboxState
from taskmesh.outbox import OutboxMessage
from taskmesh.worker import unit as units
from taskmesh.worker.unit import AlreadySettled, Key, Unit

if TYPE_CHECKING:
    from taskmesh.worker.task import MeshTask

logger = logging.getLogger(__name__)

WORKER_NAME = socket.gethostname()

# A rerun costs nothing at the broker, while every requeue counts towards the queue's delivery limit: so an attempt
# that lost its database waits for it here, until its soft time limit, before it gives the message back.
RERUNS = 25
RERUN_WAIT_MAX_SECONDS = 30.0

# The broker counts every delivery that was not acknowledged: crashes, but also drains and lost connections.
# So a task is given this many beyond its first, whatever its own limit, before it is called poison.
REDELIVERIES_MIN = 3

RESULT_MAX_BYTES = 64 * 1024

# After an even number of backslashes, which are escaped ones.
NULL_CHARACTER = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


class Settled(Ignore):  # type: ignore[misc]  # Celery has no types
    """The outcome is committed: acknowledge, and do nothing more."""


class Poison(PermanentError):
    """The task was delivered too often without an outcome."""

    code = "poison"


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
        """Counts runs from 1."""
        return (self.request.retries or 0) + 1

    def _run(self, span: Span) -> Any:
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
        span.set_status(StatusCode.ERROR, "database_unavailable")
        raise Reject("database unavailable", requeue=True)

    def _settled(self, span: Span) -> Any:
        unit = Unit(Key(self.task_id, self.sequence), self.task.app.sessions)
        with units.running(unit):
            try:
                self._check_in(unit)
                arguments, keywords = self._arguments()
                if self.task.transaction_mode == "whole":
                    unit.open()
            except AlreadySettled:
                self._skip(span)
            except Poison as error:
                self._fail(unit, error, span)
            except ContractViolation as error:
                self._dead_letter(unit, error, span)
            try:
                result = self.task.run(*arguments, **keywords)
                self._follow(unit, result)
            except AlreadySettled:
                self._skip(span)
            except (Ignore, Retry, Reject) as outcome:
                self._settle_outcome(unit, outcome, span)
            except Exception as error:
                if is_unavailable(error):
                    raise
                self._fail(unit, error, span)
            return self._succeed(unit, result, span)

    def _skip(self, span: Span) -> NoReturn:
        span.set_attribute("taskmesh.outcome", "duplicate")
        logger.info("delivery skipped: the attempt is settled already", extra={"redeliveries": self.redeliveries})
        raise Settled

    def _check_in(self, unit: Unit) -> None:
        """Settle at once what is not to be run: early, late, crashed too often, or done already."""
        if self.due_at and self.due_at > datetime.now(UTC):
            self._defer(unit)
        if self.expires_at and self.expires_at <= datetime.now(UTC):
            unit.settle_without_effect(InboxState.EXPIRED, [self._report(TaskState.EXPIRED)])
            logger.info("task expired")
            raise Settled
        limit = self.task.max_retries
        if limit is not None and self.redeliveries >= max(REDELIVERIES_MIN, limit + 1):
            raise Poison(
                f"delivered {self.redeliveries + 1} times without an outcome: the task kills its worker, hangs, or its"
                " worker was stopped each time"
            )
        if self.task.transaction_mode == "last":
            with self.task.app.sessions() as session:
                if not inbox.is_open(session, self.task_id, self.sequence):
                    raise AlreadySettled

    def _defer(self, unit: Unit) -> NoReturn:
        """Move a task that plain Celery published with an `eta` out of the worker and into the outbox."""
        assert self.due_at is not None
        # The delivery to come has this attempt's own sequence, so what is recorded is the one before it.
        unit.key = Key(self.task_id, self.sequence - 1)
        unit.settle_without_effect(
            InboxState.WAITING,
            [self.task.redelivery(due_at=self.due_at), self._report(TaskState.SCHEDULED, due_at=self.due_at)],
        )
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

    def _succeed(self, unit: Unit, result: Any, span: Span) -> Any:
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
        span.set_attribute("taskmesh.outcome", state)
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
            unit.settle(InboxState.WAITING, [*unit.messages, report])
        except AlreadySettled:
            logger.info("outcome dropped: another delivery has settled the attempt")
            raise Settled from None
        return TaskState.RETRYING

    def _settle_outcome(self, unit: Unit, outcome: BaseException, span: Span) -> NoReturn:
        """What Celery's own control exceptions mean."""
        if isinstance(outcome, Retry):
            self._retry(unit, outcome, span)
        if isinstance(outcome, Reject):
            span.set_attribute("taskmesh.outcome", "rejected")
            raise outcome
        if isinstance(outcome, Settled):
            raise outcome
        # `replace()` has sent its message and raises Ignore; a bare Ignore means: done, with nothing to tell.
        self._succeed(unit, None, span)
        raise Settled

    def _retry(self, unit: Unit, outcome: Retry, span: Span) -> NoReturn:
        onward = self._own(unit.messages)
        if onward is None:
            self._fail(unit, RuntimeError("Retry was raised by hand; call self.retry()"), span)
        cause = outcome.exc if isinstance(outcome.exc, BaseException) else None
        failure = describe(cause) if cause else TaskFailure(code="retry", message="the task asked for a retry")
        due_at = _no_sooner(onward.due_at, cause)
        onward = _with_due_at(onward, due_at)
        report = self._report(TaskState.RETRYING, due_at=due_at, failure=failure)
        try:
            unit.settle_without_effect(InboxState.WAITING, [onward, report])
        except AlreadySettled:
            self._skip(span)
        self._mark(span, cause or outcome)
        span.set_attribute("taskmesh.outcome", "retrying")
        logger.warning("attempt failed; task will be retried", extra={"code": failure.code, "due_at": due_at})
        self._call(self.task.on_retry, outcome)
        raise Settled

    def _fail(self, unit: Unit, error: BaseException, span: Span) -> NoReturn:
        unit.messages.clear()
        self._send_errbacks()
        failure = describe(error)
        report = self._report(TaskState.FAILED, failure=failure, children=self._children(unit.messages))
        try:
            unit.settle_without_effect(InboxState.FAILED, [*unit.messages, report])
        except AlreadySettled:
            self._skip(span)
        self._mark(span, error)
        span.set_attribute("taskmesh.outcome", "failed")
        logger.error("task failed", exc_info=error, extra={"code": failure.code, "redeliveries": self.redeliveries})
        self._call(self.task.on_failure, error)
        raise Settled

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

    def _dead_letter(self, unit: Unit, error: ContractViolation, span: Span) -> NoReturn:
        """Tell the ledger why, and park the message: mended and replayed, it finds the inbox open."""
        self._send_errbacks()
        report = self._report(TaskState.FAILED, failure=describe(error), children=self._children(unit.messages))
        with self.task.app.sessions() as session:
            outbox.put(session, [*unit.messages, report])
            session.may_commit = True
            session.commit()
        self._mark(span, error)
        span.set_attribute("taskmesh.outcome", "dead-lettered")
        logger.error("message dead-lettered: payload violates the contract", extra={"violation": str(error)})
        raise Reject(error, requeue=False)

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
                worker=f"{WORKER_NAME}:{os.getpid()}",
                result=result,
                failure=failure,
                children=children,
            )
        )

    def _span(self) -> Any:
        delivery = self.request.delivery_info or {}
        attributes: dict[str, Any] = {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": delivery.get("exchange") or "",
            "messaging.rabbitmq.destination.routing_key": delivery.get("routing_key") or "",
            "messaging.message.id": self.request.id,
            "taskmesh.task.id": str(self.task_id),
            "taskmesh.task.type": self.task.name,
            "taskmesh.task.attempt": self.attempt,
            "taskmesh.task.redeliveries": self.redeliveries,
        }
        return telemetry.tracer().start_as_current_span(
            f"process {self.task.name}",
            context=telemetry.extract(self.headers),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            # Exceptions' texts may quote a payload, and Ignore is how a settled attempt leaves Celery.
            record_exception=False,
            set_status_on_exception=False,
        )

    def _mark(self, span: Span, error: BaseException) -> None:
        span.set_status(StatusCode.ERROR, describe(error).code)
        span.set_attribute("error.type", qualified_name(error))


def started(message: OutboxMessage, service: str) -> LifecycleEvent:
    """What the ledger is told of a task or an event on its way out."""
    task = celery_protocol.read(message.headers, ([], {}, None))
    now = datetime.now(UTC)
    later = message.due_at is not None and message.due_at > now
    return LifecycleEvent(
        task_id=task.id,
        type=task.type,
        state=TaskState.SCHEDULED if later else TaskState.QUEUED,
        at=now,
        service=service,
        kind=task.kind,
        event_id=task.id if task.kind is TaskKind.EVENT else None,
        root_id=task.root_id,
        parent_id=task.parent_id,
        traceparent=task.traceparent,
        due_at=message.due_at,
        expires_at=message.expires_at,
    )


def celery_payload(args: tuple[Any, ...] | list[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The contract's fields, given as keyword arguments or as one positional mapping, as plain Celery may do.

    Raises:
        ContractViolation: They come in some other form.
    """
    if not args:
        return kwargs
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        return cast("Mapping[str, Any]", args[0])
    raise ContractViolation("send the contract's fields as keyword arguments, or as one positional mapping")


def describe_violation(error: ValidationError) -> str:
    """What is wrong and where, without the value: it may be personal."""
    places = [f"/{'/'.join(str(part) for part in item['loc'])}: {item['type']}" for item in error.errors()[:10]]
    return "; ".join(places)


def describe(error: BaseException) -> TaskFailure:
    """What the ledger may know of an error: our own words for our own errors, only the place for others."""
    if isinstance(error, TaskmeshError):
        return TaskFailure(code=error.code, message=_storable(str(error))[:2000], exception=qualified_name(error))
    if isinstance(error, SoftTimeLimitExceeded):
        return TaskFailure(
            code="time_limit", message="the soft time limit was exceeded", exception=qualified_name(error)
        )
    if isinstance(error, MaxRetriesExceededError):
        return TaskFailure(code="retries_exhausted", message="no retry is left", exception=qualified_name(error))
    # The text of a foreign exception often quotes the data that it choked on.
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""  # noqa: PTH119
    return TaskFailure(
        code="exception",
        message=f"{type(error).__name__}{place}; see the worker's log",
        exception=qualified_name(error),
    )


def _storable(text: str) -> str:
    """The text without what PostgreSQL cannot keep: U+0000, and halves of surrogate pairs."""
    return text.replace("\x00", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def qualified_name(error: BaseException) -> str:
    """`module.Class` of an exception."""
    return f"{type(error).__module__}.{type(error).__qualname__}"


def plain(value: Any) -> Any:
    """The JSON form of what a task returned."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def bounded(value: Any) -> Any:
    """The value, if it is JSON and small enough for the ledger.

    Raises:
        ValueError: The ledger could not keep it, or it is too large: then return a reference into the object store.
        TypeError: It is not JSON.
    """
    encoded = lifecycle.json_bytes(value)
    if NULL_CHARACTER.search(encoded):
        raise ValueError("result with the character U+0000, which PostgreSQL cannot keep")
    size = len(encoded)
    if size > RESULT_MAX_BYTES:
        raise ValueError(f"result of {size} bytes; at most {RESULT_MAX_BYTES}, return a reference instead")
    return value


def _no_sooner(due_at: datetime | None, cause: BaseException | None) -> datetime | None:
    """The retry's time, put off when the error itself says how long to wait."""
    wait: timedelta | None = getattr(cause, "retry_after", None)
    if not isinstance(wait, timedelta):
        return due_at
    earliest = datetime.now(UTC) + wait
    return max(due_at, earliest) if due_at else earliest


def _with_due_at(message: OutboxMessage, due_at: datetime | None) -> OutboxMessage:
    return OutboxMessage(
        exchange=message.exchange,
        routing_key=message.routing_key,
        body=message.body,
        headers=message.headers,
        properties=message.properties,
        mandatory=message.mandatory,
        due_at=due_at,
        expires_at=message.expires_at,
        task_id=message.task_id,
    )


def _time(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else None


def _uuid(value: Any) -> UUID | None:
    return UUID(value) if isinstance(value, str) else None
