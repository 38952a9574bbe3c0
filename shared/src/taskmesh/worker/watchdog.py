"""The end of a hung task in pools whose tasks share the worker's process, where none can be killed alone.

The pool `prefork` kills the process of a task that exceeds its hard time limit. A thread cannot be killed: so the whole
worker ends, for its supervisor to start it again. The hung task's start was counted, and it is not run for ever.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.worker import state

from taskmesh.worker.attempt import WORKER_NAME

if TYPE_CHECKING:
    from taskmesh.worker.app import WorkerApp
    from taskmesh.worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5

EXIT_CODE = os.EX_SOFTWARE


class Watchdog:
    """Ends the worker when one of its tasks exceeds its hard time limit.

    Args:
        app: Of the worker.
        shutdown: Gives back what the end of the worker interrupts.
        seconds: How long the other tasks that run may go on.
    """

    def __init__(self, app: WorkerApp, shutdown: Shutdown, *, seconds: float) -> None:
        self._app = app
        self._shutdown = shutdown
        self._seconds = seconds

    def start(self) -> None:
        """Watch from a thread of its own: in the pool `solo` the main thread is the one that hangs."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not (hung := overdue()):
            time.sleep(LOOK_SECONDS)
        for request in hung:
            logger.error(
                "worker ends: a task has exceeded its hard time limit",
                extra={**request.log_facts, "limit_seconds": limit(request)},
            )
            self._report(request)
        deadline = time.monotonic() + self._seconds
        # Time for the report to leave; then no more messages are taken.
        time.sleep(LOOK_SECONDS)
        state.should_stop = EXIT_CODE
        while (others := _others()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        self._shutdown.give_back([(UUID(request.id), f"{WORKER_NAME}:{os.getpid()}") for request in others])
        # The main thread waits for the task that hangs.
        os._exit(EXIT_CODE)

    def _report(self, request: Any) -> None:
        reports = getattr(self._app, "running_reports", None)
        if reports is not None:
            reports.lost(request, f"Worker ended: the hard time limit of {limit(request)} s was exceeded")


def overdue() -> list[Any]:
    """The running tasks that have exceeded their hard time limits."""
    now = time.time()
    running = tuple(state.active_requests)
    return [it for it in running if (seconds := limit(it)) and it.time_start and now - it.time_start > seconds]


def limit(request: Any) -> float | None:
    """The hard time limit of a task: its message's, else its declaration's."""
    seconds: float | None = request.time_limits[0] or request.task.time_limit
    return seconds


def _others() -> list[Any]:
    hung = overdue()
    return [request for request in tuple(state.active_requests) if request not in hung]
