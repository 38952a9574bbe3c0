"""What a worker says of itself to probes, from the consumer's own loop and without asking the broker.

*Alive*: the loop turns, the worker's consumers are there, and no task is held for longer than it may be. Away from
its broker or its database a worker is alive; it would be away from them after a restart as well.
*Ready*: it consumes from its queues, or was told not to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer.tasks import Tasks

from taskmesh.health import Health
from taskmesh.worker.control import Control
from taskmesh.worker.watchdog import limit

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0

LATE_SECONDS = 60.0
"""How long past its hard time limit a task may be held: a pool kills it and says so within seconds."""

DEAF_SECONDS = 60.0
"""How long a worker that means to consume may be without its consumers; it takes them up within a second."""


class Probes(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Keeps the worker's health files true."""

    requires = (Tasks, Control)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._health = Health(consumer.app.settings.health_dir, f"{consumer.app.service}-worker")
        self._held: dict[Any, float] = {}
        self._deaf_since: float | None = None
        self._fault: str | None = None
        self._asked = False
        self._timer: Any = None
        consumer.probes = self
        if consumer.app.settings.worker_pool == "solo":
            threading.Thread(target=self._beat_for_the_loop, name="probes", daemon=True).start()

    def start(self, consumer: Any) -> None:
        """Look as soon as the loop turns, and then every second."""
        self._asked = False
        self._deaf_since = None
        self._ask(consumer)
        self._timer = consumer.timer.call_repeatedly(LOOK_SECONDS, self._ask, (consumer,))

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """The connection is lost, or the worker stops: it consumes from nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._health.unready()

    def waits(self) -> None:
        """The worker has just tried to reach the broker."""
        if self._overdue() is None:
            self._health.beat()

    def _ask(self, consumer: Any) -> None:
        """Have the loop look: not every pool's timer runs in the loop's thread."""
        if not self._asked:
            self._asked = True
            consumer.call_soon(self._look, consumer)

    def _beat_for_the_loop(self) -> None:
        """In the pool `solo` the loop runs the task itself, and turns again when that has ended."""
        while True:
            time.sleep(LOOK_SECONDS)
            if state.active_requests and self._overdue() is None:
                self._health.beat()

    def _look(self, consumer: Any) -> None:
        self._asked = False
        is_consuming, is_stopping = consumes(consumer), consumer.app.is_stopping
        # A worker that stops has cancelled its consumers.
        means_to = bool(consumer.app.amqp.queues.consume_from) and not is_stopping
        fault = self._overdue() or self._deafness(deaf=means_to and not is_consuming)
        if fault is None:
            self._health.beat()
        elif fault != self._fault:
            logger.error("worker calls itself dead", extra={"reason": fault})
        self._fault = fault
        if fault is None and not is_stopping and (is_consuming or consumer.mesh_control.is_paused):
            self._health.ready()
        else:
            self._health.unready()

    def _overdue(self) -> str | None:
        """Why a task is held for longer than it may be; None when none is."""
        now = time.monotonic()
        limits = {request: limit(request) for request in tuple(state.reserved_requests)}
        self._held = {request: self._held.get(request, now) for request in limits}
        if any(seconds and runs_for(request) > seconds + LATE_SECONDS for request, seconds in limits.items()):
            return "a task runs for longer than its hard time limit"
        # One that waits in this process waits for another to end, which may have no limit.
        longest = [seconds for seconds in limits.values() if seconds]
        if len(longest) == len(limits) > 0:
            held_for = now - min(self._held.values())
            if held_for > 2 * max(longest) + LATE_SECONDS:
                return "a task is held for longer than its time limit and that of one before it"
        return None

    def _deafness(self, *, deaf: bool) -> str | None:
        """Why the worker hears nothing; None while it does, or may do so again at once."""
        now = time.monotonic()
        self._deaf_since = (self._deaf_since or now) if deaf else None
        if self._deaf_since is None or now - self._deaf_since <= DEAF_SECONDS:
            return None
        return "the broker has no consumer of this worker any more"


def runs_for(request: Any) -> float:
    """How many seconds a task has run; 0 while it waits."""
    return time.time() - request.time_start if request.time_start else 0.0


def consumes(consumer: Any) -> bool:
    """True if the worker's channel is open and has a consumer on each of its queues."""
    tasks = consumer.task_consumer
    channel = tasks.channel if tasks is not None else None
    if channel is None or not getattr(channel, "is_open", False):
        return False
    names = list(consumer.app.amqp.queues)
    return all(tasks.consuming_from(name) for name in names)


def while_connecting(consumer: Any, ensure: Callable[..., Any]) -> Callable[..., Any]:
    """`Connection.ensure_connection`, with a sign of life at each attempt and each second between two."""

    def patient(errback: Any, max_retries: int | None, *, callback: Callable[[], None]) -> Any:
        def turn() -> None:
            consumer.probes.waits()
            callback()

        consumer.probes.waits()
        return ensure(errback, max_retries, callback=turn)

    return patient
