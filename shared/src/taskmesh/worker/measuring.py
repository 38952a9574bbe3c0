"""What a worker measures: its slots, and how long each delivery takes. What its tasks measure is recorded here, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from celery.worker import state

from taskmesh import telemetry
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.metrics import catalogue, instruments, provider
from taskmesh.metrics.pool import Channel
from taskmesh.settings import WorkerSettings

if TYPE_CHECKING:
    from taskmesh.worker.attempt import Attempt


def show_slots(settings: WorkerSettings) -> None:
    """Say how many tasks the worker runs, and how many it can; in its main process."""
    catalogue.WORKER_IN_FLIGHT.watch(lambda: len(state.active_requests))
    catalogue.WORKER_SLOTS.watch(lambda: settings.worker_concurrency)


class PoolMetrics:
    """The metrics of a worker with pool children: exported by the main process, which makes this before it forks."""

    def __init__(self, service: str, settings: WorkerSettings) -> None:
        provider.start(telemetry.resource(service, "worker"), telemetry.release(), settings)
        sink = instruments.sink()
        self._channel = Channel() if sink is not None else None
        if self._channel is not None and sink is not None:
            self._channel.receive(sink)

    def enter_child(self) -> None:
        """Have this pool child send what it measures to the main process."""
        provider.leave()
        if self._channel is not None:
            self._channel.send_from_child()

    def stop(self) -> None:
        """Export the rest; called when the children are gone."""
        if self._channel is not None:
            self._channel.stop()
        provider.stop()


@contextmanager
def measured(attempt: Attempt) -> Iterator[None]:
    """Record how long the block takes that runs the attempt, from its first look into the inbox to its last commit.

    A process that is killed in the middle records nothing: its task runs again.
    """
    began = time.perf_counter()
    try:
        yield
    finally:
        catalogue.PROCESS_DURATION.record(
            time.perf_counter() - began,
            # What plain Celery has sent has none, and its span is over.
            attempt.headers.get("traceparent") or "",
            messaging_system="rabbitmq",
            messaging_operation_name="process",
            messaging_destination_name=_queue(attempt),
            taskmesh_task_type=attempt.task.name,
            taskmesh_outcome=attempt.outcome,
            error_type=attempt.error_type,
        )


def _queue(attempt: Attempt) -> str:
    service: str = attempt.task.app.service
    return f"{service}.events" if attempt.kind is TaskKind.EVENT else service
