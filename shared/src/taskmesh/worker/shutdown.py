"""How a worker stops: it takes no more tasks, finishes what runs within the time it has, and gives the rest back.

Celery does this in its signal handler, where it sleeps while tasks end unseen, and where it may find the main thread in
the middle of writing a frame and wait for ever for the answer to its own. Here the handler only rings: the work is done
in the consumer's loop, which goes on to settle what ends, and stops as soon as nothing runs.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.apps.worker import on_cold_shutdown
from celery.platforms import EX_FAILURE
from celery.signals import worker_process_init
from celery.worker import state
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from taskmesh import inbox, logs, telemetry
from taskmesh.worker.attempt import WORKER_NAME

if TYPE_CHECKING:
    from taskmesh.worker.app import WorkerApp

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05

# A loop that has not answered for so long is not turning: it waits for a broker that is away, or does not answer.
RING_SECONDS = 2.0

# A row that is held for longer belongs to a transaction that outlives its process: a query that cannot be cancelled.
LOCK_TIMEOUT = text("set local lock_timeout = '2s'")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Shutdown:
    """Stops one worker when the process is told to.

    Args:
        app: Of the worker.
        worker: Celery's; its program.
        seconds: How long running tasks may go on.
    """

    def __init__(self, app: WorkerApp, worker: Any, *, seconds: float) -> None:
        self._app = app
        self._worker = worker
        self._seconds = seconds
        self._rung = False
        self._deadline: float | None = None
        self._is_over = False
        self._ended: list[tuple[UUID, str]] = []

    def install(self) -> None:
        """Take the place of Celery's handlers, which it installs when the worker starts."""
        install = self._worker.install_platform_tweaks

        def install_ours(worker: Any) -> None:
            install(worker)
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
            signal.signal(signal.SIGALRM, self._on_silence)

        # Celery's pool resets the others in its processes: there an alarm is a task's own.
        worker_process_init.connect(lambda **_: signal.signal(signal.SIGALRM, signal.SIG_DFL), weak=False)
        self._worker.install_platform_tweaks = install_ours
        stop = self._worker.stop

        def stop_ours(in_sighandler: bool = False, exitcode: int | None = None) -> None:  # noqa: FBT001, FBT002 - Celery's
            if exitcode == EX_FAILURE:
                self._fail()
            stop(in_sighandler, exitcode)

        self._worker.stop = stop_ours

    def give_back(self, running: list[tuple[UUID, str]]) -> None:
        """Have the starts of these tasks, and `host:pid` of this process, not counted; the process ends next."""
        self._note(running)
        if running:
            # They hold the rows in which that is written, and cannot be made to let go of them.
            with suppress(SQLAlchemyError):
                self._app.cut_connections()
        self.take_back_starts()

    def take_back_starts(self) -> None:
        """Have the starts that this shutdown has ended not counted; called when their processes are gone."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        try:
            with self._app.sessions() as session:
                session.execute(LOCK_TIMEOUT)
                inbox.take_back_starts(session, ended)
                session.may_commit = True
                session.commit()
        except SQLAlchemyError:
            # They then count as lost: each of these tasks has one attempt less.
            logger.warning("starts could not be taken back", extra=_tasks(ended))

    def _note(self, running: list[tuple[UUID, str]]) -> None:
        self._ended = running
        if running:
            logger.warning("tasks given back: they have not ended in time", extra=_tasks(running))

    def _on_signal(self, *_: object) -> None:
        if self._rung:
            # Told twice: there is no time left.
            self._deadline = time.monotonic()
            if not self._is_over:
                signal.setitimer(signal.ITIMER_REAL, RING_SECONDS)
            return
        self._rung = self._app.is_stopping = True
        hub = getattr(self._worker, "hub", None)
        if self._app.settings.worker_pool != "prefork":
            # The consumer looks at this flag between two messages; Celery then waits for the tasks, however long.
            self._end()
            state.should_stop = os.EX_OK
            threading.Thread(target=self._give_up_in_time, daemon=True).start()
        elif hub is None:
            # Nothing has begun.
            self._end()
            state.should_stop = os.EX_OK
        else:
            hub.call_soon(self._begin)
            signal.setitimer(signal.ITIMER_REAL, RING_SECONDS)

    def _on_silence(self, *_: object) -> None:
        """The loop did not take the call, or missed the deadline: it is connecting, or is stuck in it."""
        if not self._is_over:
            self._stop_at_once()

    def _begin(self) -> None:
        """Take no more messages, then look now and then whether all is done."""
        if self._is_over:
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        signal.setitimer(signal.ITIMER_REAL, max(0, self._deadline - time.monotonic()) + RING_SECONDS)
        logger.info("worker stops", extra={"running": len(state.reserved_requests)})
        consumer = self._worker.consumer
        if consumer.task_consumer is not None:
            try:
                consumer.task_consumer.cancel()
            except (*consumer.connection_errors, *consumer.channel_errors):
                # The messages go back to their queues all by themselves.
                logger.debug("consumer was cancelled by the loss of its connection")
        self._look()

    def _look(self) -> None:
        assert self._deadline is not None
        if self._is_over:
            # Celery's pool fires timers while it stops.
            return
        if not state.reserved_requests:
            self._end()
            state.should_stop = os.EX_OK
        elif time.monotonic() >= self._deadline:
            self._stop_at_once()
        else:
            self._worker.timer.call_after(LOOK_SECONDS, self._look)

    def _stop_at_once(self) -> None:
        """Kill what still runs; its messages go back, and its starts are not counted."""
        self._end()
        self._note(self._running())
        # Its own wait is over before it begins.
        self._app.conf.worker_soft_shutdown_timeout = 0
        try:
            if getattr(self._worker, "consumer", None) is not None:
                on_cold_shutdown(self._worker)
                # The messages go back when the connection is closed, and another worker takes them in that moment.
                self.take_back_starts()
        finally:
            state.should_terminate = True

    def _fail(self) -> None:
        """End the process, when its loop has failed; Celery would wait for tasks of which it hears nothing any more."""
        pool = getattr(getattr(self._worker, "pool", None), "_pool", None)
        if self._app.settings.worker_pool != "prefork" or pool is None:
            return
        self._end()
        logger.error("worker ends: its loop has failed", extra={"worker": os.getpid()})
        self._note(self._running())
        for process in pool._pool:  # noqa: SLF001 - it has no other list of them
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.take_back_starts()
        telemetry.stop()
        # The messages go back when the connection is gone.
        os._exit(EX_FAILURE)

    def _end(self) -> None:
        """Ring no more: an alarm that comes when Python has taken its handlers down would kill the process."""
        self._is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _give_up_in_time(self) -> None:
        """Of pools that cannot kill a task: end the process when the time is up."""
        self._deadline = time.monotonic() + self._seconds
        while time.monotonic() < self._deadline:
            time.sleep(LOOK_SECONDS)
        if not state.active_requests:
            return
        self.give_back(self._running())
        os._exit(os.EX_OK)

    def _running(self) -> list[tuple[UUID, str]]:
        return [
            (UUID(request.id), f"{WORKER_NAME}:{request.worker_pid}")
            for request in tuple(state.active_requests)
            if request.worker_pid
        ]


def _tasks(running: list[tuple[UUID, str]]) -> dict[str, Any]:
    return {"tasks": len(running), **logs.of_tasks(task_id for task_id, _ in running)}
