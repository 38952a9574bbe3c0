"""Celery's consumer, changed so that nothing is dropped.

Stock Celery acknowledges some bad messages away, and dies or goes deaf of others. Here every message is either handed
to a task or dead-lettered with its cause in the log, and no exception reaches the event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from billiard.einfo import ExceptionWithTraceback
from celery import bootsteps
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, Terminated, WorkerLostError
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request
from kombu.connection import Connection
from kombu.exceptions import KombuError

from taskmesh import celery_protocol, exchanges, lifecycle
from taskmesh.celery_protocol import EVENT_ID_HEADER, KIND_HEADER, MalformedMessage
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.worker import foreign_frames
from taskmesh.worker.control import Control
from taskmesh.worker.probes import Probes, while_connecting

logger = logging.getLogger(__name__)

foreign_frames.install()

# A task that ends sooner is never reported as running: the report would only trail behind its outcome.
RUNNING_REPORT_SECONDS = 0.2


class MeshRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A delivery in the worker's main process."""

    _given_back = False

    @property
    def is_with_pool(self) -> bool:
        """True once it was handed to the pool, which cannot be told to forget it."""
        return self._apply_result is not None

    @property
    def log_facts(self) -> dict[str, Any]:
        """The task's facts for a log line; starts that were lost before are known to the inbox only."""
        return celery_protocol.log_facts(self.request_dict)

    def give_back(self) -> None:
        """Let the message go back to the queue before any process begins with it."""
        self._given_back = True
        worker_state.task_ready(self)
        self.reject(requeue=True)

    def revoked(self) -> bool:
        """True if it must not be handed to the pool any more."""
        return self._given_back or bool(super().revoked())

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A process of the pool has taken the task."""
        super().on_accepted(pid, time_accepted)
        reports = getattr(self._app, "running_reports", None)
        if reports is not None:
            reports.started(self, pid)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """The process is gone, or something escaped from the task: the message goes back, or to the dead letters."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Terminated) and not self._already_cancelled:
            # We killed it, for its cancellation: Celery would acknowledge, and nobody would settle the task.
            worker_state.task_ready(self)
            self.reject(requeue=True)
            return
        if isinstance(error, SoftTimeLimitExceeded):
            # It came when the attempt was over, in Celery's own code around it. If anything is left to be done, the
            # inbox knows; parked, the message would say of a settled task that it has failed.
            worker_state.task_ready(self)
            logger.warning(
                "message given back: the soft time limit came after the attempt's end",
                extra=self.log_facts,
            )
            self.reject(requeue=True)
            return
        if isinstance(error, WorkerLostError):
            # Its text ends with the pool's own number for the job.
            how = str(error).partition(" Job: ")[0]
            logger.warning(
                "running task has lost its process", extra={**self.log_facts, "worker": self.worker_pid, "reason": how}
            )
            self._lost(how)
        elif not isinstance(error, Ignore | Reject | Retry | Terminated):
            logger.error("attempt came to no end", extra={**self.log_facts, "exception": type(error).__qualname__})
        super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:  # noqa: FBT001 - Celery's signature
        """A time limit was reached; after the hard one the process is killed."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        # Celery would call the task's own hook, here in the main process: the run will be repeated, and may succeed.
        self._lost(f"Worker killed: the hard time limit of {timeout} s was exceeded")
        worker_state.task_ready(self)
        logger.warning(
            "running task killed: it has exceeded its hard time limit",
            extra={**self.log_facts, "worker": self.worker_pid, "limit_seconds": timeout},
        )
        self.reject(requeue=True)

    def acknowledge(self) -> None:
        """The task is settled."""
        self._ended()
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - Celery's signature
        """The message goes back to the queue, or to the dead letters."""
        self._ended()
        super().reject(requeue=requeue)

    def _ended(self) -> None:
        reports = getattr(self._app, "running_reports", None)
        if reports is not None:
            reports.ended(self)

    def _lost(self, how: str) -> None:
        reports = getattr(self._app, "running_reports", None)
        if reports is not None:
            reports.lost(self, how)


class RunningReports(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Tells the ledger which tasks have begun to run, and which of them have lost their process; best effort.

    The outcome of a task is told through the outbox, from which nothing is lost; that a task is running is news that
    is of use only while it is true. Many tasks are told of in one message.
    """

    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._waiting: dict[str, tuple[float, LifecycleEvent]] = {}
        self._losses: list[LifecycleEvent] = []
        self._connection: Connection | None = None
        self._timer: Any = None
        consumer.app.running_reports = self

    def start(self, consumer: Any) -> None:
        """Begin to send reports."""
        self._service = consumer.app.service
        self._open = consumer.app.connection_for_write
        self._errors = (OSError, KombuError, *consumer.connection_errors, *consumer.channel_errors)
        self._timer = consumer.timer.call_repeatedly(RUNNING_REPORT_SECONDS, self._send)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Stop sending reports."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._disconnect()

    def started(self, request: MeshRequest, pid: int) -> None:
        """Note that a task has begun."""
        now = datetime.now(UTC)
        event = _event(request, TaskState.RUNNING, now, started_at=now, worker=f"{request.hostname}:{pid}")
        self._waiting[request.id] = (now.timestamp(), event)

    def ended(self, request: MeshRequest) -> None:
        """Forget a task whose start need not be told any more."""
        self._waiting.pop(request.id, None)

    def lost(self, request: MeshRequest, how: str) -> None:
        """Note that a task's process is gone, and the task back in its queue."""
        # It was running, however short.
        _, running = self._waiting.pop(request.id, (0.0, None))
        if running is not None:
            self._losses.append(running)
        failure = TaskFailure(code="worker_lost", message=how)
        worker = f"{request.hostname}:{request.worker_pid}"
        self._losses.append(_event(request, TaskState.QUEUED, datetime.now(UTC), worker=worker, failure=failure))

    def _send(self) -> None:
        before = datetime.now(UTC).timestamp() - RUNNING_REPORT_SECONDS
        due = [task_id for task_id, (at, _) in list(self._waiting.items()) if at <= before]
        running = [entry[1] for task_id in due if (entry := self._waiting.pop(task_id, None))]
        losses, self._losses = self._losses, []
        # A message tells of one state.
        messages = [
            [*running, *(event for event in losses if event.state is TaskState.RUNNING)],
            [event for event in losses if event.state is TaskState.QUEUED],
        ]
        for events in filter(None, messages):
            try:
                self._publish(events)
            except self._errors:
                logger.debug("running tasks could not be reported", extra={"tasks": len(events)})
                self._disconnect()

    def _publish(self, events: list[LifecycleEvent]) -> None:
        if self._connection is None:
            # Short time-outs: this runs in the consumer's own loop. No heartbeat, so an idle connection is replaced.
            self._connection = self._open(connect_timeout=1, heartbeat=0)
            self._connection.transport_options = {"read_timeout": 1, "write_timeout": 1}
        with self._connection.Producer() as producer:
            producer.publish(
                lifecycle.encode(events),
                exchange=exchanges.LIFECYCLE,
                routing_key=lifecycle.routing_key(events[0]),
                content_type="application/json",
                content_encoding="utf-8",
                delivery_mode=1,
                retry=False,
            )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except self._errors:
                logger.debug("connection for running reports was lost")


def _event(request: MeshRequest, state: TaskState, at: datetime, **facts: Any) -> LifecycleEvent:
    headers = request.request_dict
    retries = headers.get("retries") or 0
    return LifecycleEvent(
        task_id=UUID(request.id),
        type=request.task.name,
        state=state,
        at=at,
        service=request.app.service,
        kind=TaskKind(headers.get(KIND_HEADER, TaskKind.COMMAND)),
        sequence=celery_protocol.sequence(headers.get("replaced_task_nesting") or 0, retries),
        attempt=retries + 1,
        root_id=headers.get("root_id"),
        parent_id=headers.get("parent_id"),
        event_id=headers.get(EVENT_ID_HEADER),
        traceparent=headers.get("traceparent"),
        **facts,
    )


class MeshConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Dead-letters whatever it cannot hand to a task."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        """Without native delayed delivery, which widens bindings on live exchanges and forgets routing keys."""

        default_steps = (
            *(step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")),
            RunningReports,
            Control,
            Probes,
        )

    def ensure_connected(self, conn: Any) -> Any:
        """As Celery does, however long it takes; the worker is alive meanwhile."""
        conn.ensure_connection = while_connecting(self, conn.ensure_connection)
        return super().ensure_connected(conn)

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """Park what stock Celery would acknowledge away."""
        self._dead_letter(message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Park what is no Celery message."""
        self._dead_letter(message, MalformedMessage("headers are missing"))

    def on_unknown_task(self, body: Any, message: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Park a task that this service has no code for, perhaps not yet."""
        self._dead_letter(message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Park a message whose envelope Celery refuses."""
        self._dead_letter(message, exc)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Celery's handler, fed with checked messages only, and with no way out for an exception."""
        receive = super().create_task_handler(*args, **kwargs)
        broker_errors = self.connection_errors + self.channel_errors

        def handle(message: Any) -> None:
            try:
                self._prepare(message)
                receive(message)
            except broker_errors:
                raise
            except Exception as error:  # noqa: BLE001 - one of the three loops: an escape would end the process
                if not message.acknowledged:
                    self._dead_letter(message, error)

        return handle

    def _prepare(self, message: Any) -> None:
        """Check the message, and move what Celery must not act on into headers of our own.

        Raises:
            MalformedMessage: It is not Celery protocol v2.
        """
        headers = message.headers
        task = celery_protocol.read(headers, message.payload)
        headers[celery_protocol.RECEIVED_HEADER] = time.time_ns() // 1000
        expires = headers.pop("expires", None)
        if expires:
            headers.setdefault(celery_protocol.EXPIRES_HEADER, expires)
        eta = headers.pop("eta", None)
        if eta:
            headers.setdefault(celery_protocol.ETA_HEADER, _aware(eta))
        if task.kind is TaskKind.EVENT and EVENT_ID_HEADER not in headers:
            # Every listener's handling is a task of its own, with the same id however often the event is delivered.
            headers[EVENT_ID_HEADER] = headers["id"]
            headers["id"] = str(celery_protocol.listener_task_id(task.id, self.app.service))

    def _dead_letter(self, message: Any, error: BaseException) -> None:
        code = getattr(error, "code", "unknown_task" if isinstance(error, KeyError) else "malformed")
        logger.error(
            "message dead-lettered",
            extra={
                "code": code,
                "exception": type(error).__name__,
                "reason": str(error) if isinstance(error, MalformedMessage) else None,
                **celery_protocol.log_facts(message.headers),
            },
        )
        message.reject_log_error(logger, self.connection_errors, requeue=False)


def _aware(eta: Any) -> str:
    try:
        moment = datetime.fromisoformat(eta)
    except (TypeError, ValueError) as error:
        raise MalformedMessage("eta must be an ISO 8601 time") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()
