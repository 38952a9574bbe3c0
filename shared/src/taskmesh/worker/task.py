"""The base class of tasks: Celery's API, on top of a transaction that the runtime owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from uuid import UUID, uuid4

from celery import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from pydantic import ValidationError
from sqlalchemy.orm import Session

from taskmesh import baggage, celery_protocol, lifecycle, outbox, telemetry
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts import Command, Contract, Event
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.errors import ContractViolation, PermanentError, TaskCancelled, TransientError
from taskmesh.outbox import OutboxMessage
from taskmesh.worker import soft_limits
from taskmesh.worker import unit as units
from taskmesh.worker.attempt import Attempt
from taskmesh.worker.failures import describe_violation
from taskmesh.worker.measuring import measured
from taskmesh.worker.reports import started
from taskmesh.worker.values import celery_payload
from taskmesh.worker.watching import CancelWatch

if TYPE_CHECKING:
    from taskmesh.worker.app import WorkerApp

TransactionMode = Literal["whole", "last"]


class MeshTask(Task):  # type: ignore[misc]  # Celery has no types
    """A task whose effect, inbox row and messages commit together.

    What Celery documents for `delay`, `apply_async`, `retry`, `autoretry_for`, `retry_backoff`, `max_retries`,
    `countdown`, `eta`, `expires`, `link`, chains and groups holds, with three differences: what a failed or retried
    attempt sent is not sent; nothing leaves before the commit, so `.get()` on a child cannot work; there are no chords.
    """

    app: WorkerApp
    abstract = True
    Request = "taskmesh.worker.consumer:MeshRequest"

    # Set here and not in Celery's configuration, which a task copies when it is bound: that may be before it is loaded.
    acks_late = True
    reject_on_worker_lost = True
    # Attempts settle themselves and are then acknowledged; whatever else escapes is parked, not dropped.
    acks_on_failure = False
    acks_on_timeout = False
    ignore_result = True
    serializer = "json"
    # Above the longest task of the services that ship with the mesh; a task may set its own.
    time_limit = 300
    soft_time_limit = 270

    contract: ClassVar[type[Contract] | None] = None
    transaction_mode: ClassVar[TransactionMode] = "whole"
    force_cancel: ClassVar[bool] = False

    # A failure that may pass is retried after 1, 2, 4, 8 and 16 seconds, each shortened at random.
    autoretry_for = (TransientError, SoftTimeLimitExceeded)
    dont_autoretry_for = (Reject, PermanentError, TaskCancelled)
    max_retries = 5
    retry_backoff = True
    retry_backoff_max = 600
    retry_jitter = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one delivery to its committed outcome; called by a person's code, just run the function."""
        if self.request.called_directly:
            return super().__call__(*args, **kwargs)
        attempt = Attempt(self, args, kwargs)
        with soft_limits.attempt(), measured(attempt):
            return attempt.run()

    @property
    def session(self) -> Session:
        """The session of the transaction that commits the task's effect with its inbox row; never commit it.

        Raises:
            RuntimeError: No attempt is running.
        """
        return self._unit().session

    @property
    def task_id(self) -> UUID:
        """The id of the running task; of its caller, when the task is called like a function.

        Raises:
            RuntimeError: No attempt is running.
        """
        return self._unit().key.task_id

    @property
    def is_cancelled(self) -> bool:
        """True once somebody wants the running task cancelled; asks the database at most twice a second.

        Raises:
            RuntimeError: No attempt is running.
        """
        unit = self._unit()
        if unit.watch is None:
            unit.watch = CancelWatch(self.app.settings.database_url, unit.key.task_id)
        return unit.watch.is_cancelled()

    def raise_if_cancelled(self) -> None:
        """Return at once, in a loop or before an expensive step, unless somebody wants the running task cancelled.

        Raises:
            TaskCancelled: Somebody does; let it pass. What the task wrote is undone, but for committed steps.
            RuntimeError: No attempt is running.
        """
        if self.is_cancelled:
            raise TaskCancelled("cancelled while it ran")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A short transaction of its own, committed at the end of the block: a claim, or a read before slow work.

        It is not undone when the task fails later, so it must be safe to repeat.
        """
        session = self.app.sessions()
        try:
            yield session
            session.may_commit = True
            session.commit()
        finally:
            units.give_up(session)

    def after_commit(self, act: Callable[[], None]) -> None:
        """Have `act` called when, and only if, the task's own transaction has been committed; for counting effects.

        Not called when the process is killed in between, or the answer to the commit is lost. What it raises is logged.
        """
        self._unit().after_commit.append(act)

    def send(self, command: Command, **options: Any) -> UUID:
        """Send a command when, and only if, this task commits; takes the options of `apply_async`.

        Returns:
            The id of the new task.
        """
        result = self.app.send_task(command.type_name, kwargs=command.payload(), **options)
        return UUID(result.id)

    def emit(self, event: Event, *, session: Session | None = None) -> UUID:
        """Publish an event when, and only if, this task commits.

        Args:
            event: What has happened.
            session: A transaction of `self.transaction()` that makes the event true: it then leaves with that commit,
                whatever becomes of the task afterwards.

        Returns:
            The id of the event.
        """
        request = self.app.current_worker_task.request
        message = TaskMessage(
            type=event.type_name,
            id=uuid4(),
            payload=event.payload(),
            kind=TaskKind.EVENT,
            root_id=UUID(request.root_id or request.id),
            parent_id=self.task_id,
            traceparent=telemetry.current_traceparent(),
            baggage=baggage.current(),
            tenant=(request.headers or {}).get(celery_protocol.TENANT_HEADER),
            version=event.version,
        )
        outgoing = celery_protocol.event(message)
        if session is None:
            self._unit().messages.append(outgoing)
        else:
            outbox.put(session.connection(), [outgoing, lifecycle.message(started(outgoing, self.app.service))])
        return message.id

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Celery's `apply_async`; a task with a contract takes an instance of it, or its fields.

        Raises:
            ContractViolation: The fields do not fit: the sender learns it, not a dead letter.
        """
        contract = self.contract
        if contract is not None:
            args, kwargs = (), self._validated(contract, args, kwargs)
        return super().apply_async(args, kwargs, **options)

    def on_replace(self, sig: Any) -> Any:
        """Celery's end of `replace`.

        Raises:
            Ignore: The replacement leaves when the attempt commits.
            NotImplementedError: No single task carries this task's id on. A chain would give it to its last link, which
                may never come to run.
        """
        try:
            return super().on_replace(sig)
        except Ignore:
            unit = units.current()
            if unit is not None and not any(message.task_id == unit.key.task_id for message in unit.messages):
                raise NotImplementedError(f"{self.name}: a task is replaced by one task, not by a chain") from None
            raise

    @staticmethod
    def _validated(contract: type[Contract], args: Any, kwargs: Any) -> dict[str, Any]:
        if args and isinstance(args[0], contract):
            return args[0].payload()
        try:
            return contract.model_validate(celery_payload(tuple(args or ()), kwargs or {})).payload()
        except ValidationError as error:
            raise ContractViolation(describe_violation(error)) from error

    def redelivery(self, *, due_at: datetime) -> OutboxMessage:
        """The running delivery again, at `due_at`, straight to the queue that it came from."""
        request = self.request
        options = request.as_execution_options()
        # What waits for a time of its own begins a trace of its own.
        options["headers"].pop("traceparent", None)
        unit = units.Unit(units.Key(self.task_id, 0), self.app.connect)
        with units.running(unit):
            self.app.send_task(
                self.name,
                args=list(request.args or ()),
                kwargs=dict(request.kwargs or {}),
                eta=max(due_at, datetime.now(UTC)),
                **options,
            )
        return unit.messages[0]

    def _unit(self) -> units.Unit:
        unit = units.current()
        if unit is None:
            raise RuntimeError(f"{self.name}: a session and messages exist only while a worker runs the task")
        return unit
