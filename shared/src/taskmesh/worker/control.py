"""What a worker's main process obeys besides its queues of work: cancellations, and pauses.

The relay writes them into the service's database. The main process reads them there once a second, with short
time-outs, because it does so in the loop that also serves the broker and the pool.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from pydantic import ValidationError
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import SQLAlchemyError

from taskmesh import control, logs
from taskmesh.amqp import Backoff
from taskmesh.database import async_engine, sync_engine
from taskmesh.inbox import cancellations, pauses

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0

# A database that is away for so long is not about to come back. A task that is taken then can only wait in its process
# for its time limit, and go back: each time a delivery, of which the queue allows a limited number.
OUTAGE_SECONDS = 10.0

# Of a network that swallows packets the loop must hear soon.
IMPATIENT = {"connect_timeout": 2, "tcp_user_timeout": 2000}
STATEMENT_TIMEOUT = text("set local statement_timeout = '1s'")

DRAIN_BATCH = 200


class Control(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Lets the consumer take tasks, or not, and kills those whose cancellation is forced.

    No task is taken before the control messages that wait are applied and the service is known not to be paused: what
    was cancelled while no worker ran does not run. When the database is away that is put off, as is all work: then no
    more tasks are taken, either.
    """

    # The consumer has been made then, and the loop that has it consume starts last.
    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._service: str = consumer.app.service
        self._url = consumer.app.settings.database_url
        self._engine: Engine | None = None
        self._backoff = Backoff(first_seconds=LOOK_SECONDS, longest_seconds=5.0)
        self._not_before = 0.0
        self._lost_at: float | None = None
        self._drained = False
        self._paused: bool | None = None
        self._asked = False
        self._timer: Any = None
        consumer.mesh_control = self

    @property
    def is_paused(self) -> bool:
        """True while a person wants the service's workers to take no tasks, as far as the database can tell."""
        return self._paused is True and self._lost_at is None

    def start(self, consumer: Any) -> None:
        """Decide before the first task, and then every second."""
        self._drained = self._asked = False
        self._not_before = 0.0
        self._look(consumer)
        self._timer = consumer.timer.call_repeatedly(LOOK_SECONDS, self._ask, (consumer,))

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self, consumer: Any) -> None:
        """Have the loop look: not every pool's timer runs in the loop's thread, which alone may use the channel."""
        if not self._asked and time.monotonic() >= self._not_before:
            self._asked = True
            consumer.call_soon(self._look, consumer)

    def _look(self, consumer: Any) -> None:
        self._asked = False
        try:
            if not self._drained:
                self._drained = self._drain(consumer)
            paused, unwanted = self._read(_killable(consumer))
        except SQLAlchemyError as error:
            now = time.monotonic()
            if self._lost_at is None:
                logger.warning("control tables cannot be read", extra={"exception": type(error).__name__})
                self._lost_at = now
            self._not_before = now + self._backoff.next()
            away = now - self._lost_at >= OUTAGE_SECONDS
            paused, unwanted = (away or self._paused is not False or not self._drained), []
        else:
            self._lost_at = None
            self._not_before = 0.0
            self._backoff.reset()
            if paused != self._paused and (paused or self._paused is not None):
                logger.info("worker paused" if paused else "worker resumed")
            self._paused = paused
        # A worker that stops may lose its connection, and has come back with another.
        if paused or consumer.app.is_stopping:
            self._withdraw(consumer)
        else:
            self._attach(consumer)
        for request in unwanted:
            logger.warning(
                "running task killed: its cancellation is forced",
                extra={**request.log_facts, "worker": request.worker_pid},
            )
            consumer.pool.terminate_job(request.worker_pid, signal.SIGKILL)

    def _read(self, killable: dict[UUID, Any]) -> tuple[bool, Sequence[Any]]:
        """Whether the service is paused, and which of these requests nobody wants any more."""
        if self._engine is None:
            options = {**IMPATIENT, "application_name": f"{self._service}-worker-control"}
            self._engine = sync_engine(self._url, pool_size=1, max_overflow=0, connect_args=options)
        with self._engine.begin() as connection:
            connection.execute(STATEMENT_TIMEOUT)
            paused = connection.execute(select(pauses.c.paused_at)).scalar_one_or_none() is not None
            if not killable:
                return paused, []
            forced = select(cancellations.c.task_id).where(cancellations.c.task_id.in_(killable), cancellations.c.force)
            return paused, [killable[task_id] for task_id in connection.execute(forced).scalars()]

    def _drain(self, consumer: Any) -> bool:
        """Apply the control messages that wait; False if they could not be fetched."""
        channel = consumer.connection.channel()
        try:
            while batch := _fetch(channel, control.queue_of(self._service)):
                messages: list[control.Message] = []
                tags = []
                for delivery in batch:
                    try:
                        messages.append(control.decode(_bytes(delivery.body)))
                    except ValidationError as error:
                        logger.error("control message rejected", extra={"reason": control.faults(error)})  # noqa: TRY400
                        channel.basic_reject(delivery.delivery_tag, requeue=False)
                    else:
                        tags.append(delivery.delivery_tag)
                try:
                    asyncio.run(self._apply(messages))
                except SQLAlchemyError:
                    raise
                except Exception:
                    # The relay takes them one by one, and parks the one that nobody can apply.
                    logger.exception("control messages could not be applied")
                    return True
                for tag in tags:
                    channel.basic_ack(tag)
                logger.info("control messages applied", extra={"count": len(messages)})
        finally:
            # What is not acknowledged goes back to the queue.
            channel.close()
        return True

    async def _apply(self, messages: Sequence[control.Message]) -> None:
        engine = async_engine(self._url, pool_size=1)
        try:
            await control.apply(engine, messages, self._service)
        finally:
            await engine.dispose()

    def _attach(self, consumer: Any) -> None:
        """Consume from every queue from which the consumer does not."""
        queues, tasks = consumer.app.amqp.queues, consumer.task_consumer
        missing = [queue for name, queue in queues.items() if name not in queues.consume_from]
        for queue in missing:
            tasks.add_queue(queues.select_add(queue))
        # Before the loop has begun nobody would take the messages; it has them consumed itself.
        if missing and tasks.on_message is not None:
            tasks.consume()

    def _withdraw(self, consumer: Any) -> None:
        """Consume from no queue, and give back what no process has begun with."""
        queues, tasks = consumer.app.amqp.queues, consumer.task_consumer
        for name in list(queues.consume_from):
            queues.deselect(name)
            tasks.cancel_by_queue(name)
        waiting = [request for request in tuple(state.reserved_requests) if not request.is_with_pool]
        for request in waiting:
            request.give_back()
        if waiting:
            tasks = logs.of_tasks(request.id for request in waiting)
            logger.info("tasks given back: the worker takes none", extra={"tasks": len(waiting), **tasks})


def _killable(consumer: Any) -> dict[UUID, Any]:
    """The running requests whose process may be killed; only a pool of processes can do that."""
    if consumer.app.settings.worker_pool != "prefork":
        return {}
    return {
        UUID(request.id): request
        for request in tuple(state.active_requests)
        if request.task.force_cancel and request.worker_pid
    }


def _fetch(channel: Any, queue: str) -> list[Any]:
    """Some of the messages that wait in a queue."""
    batch: list[Any] = []
    while len(batch) < DRAIN_BATCH and (message := channel.basic_get(queue)) is not None:
        batch.append(message)
    return batch


def _bytes(body: bytes | str) -> bytes:
    return body if isinstance(body, bytes) else body.encode()
