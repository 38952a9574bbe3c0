"""The roles of a worker service: `setup`, `check`, `worker` and `relay`, each a process of the same image."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskmesh import garbage, logs, telemetry
from taskmesh.checking import check, patiently
from taskmesh.database import async_engine, migrate
from taskmesh.health import Health
from taskmesh.settings import CheckSettings, RelaySettings, SetupSettings, WorkerSettings, load

if TYPE_CHECKING:
    from taskmesh.worker.app import WorkerApp

logger = logging.getLogger(__name__)

# Read when Celery's worker is imported: SIGTERM means "finish what runs within the soft shutdown time, give the rest
# back", rather than "finish everything, however long it takes".
os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")


def main(
    app: WorkerApp,
    *,
    settings: type[WorkerSettings] = WorkerSettings,
    scripts: Path | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run one role of a worker service; the whole of its `__main__.py`.

    Args:
        app: The service's app, with its tasks declared.
        settings: What the worker role reads from the environment.
        scripts: The service's Alembic folder; None for a service without tables of its own.
        arguments: The command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"{app.service}-worker", description=f"The roles of {app.service}.")
    parser.add_argument("role", choices=["setup", "check", "worker", "relay"])
    parser.add_argument("--version", action="version", version=app.release)
    role = parser.parse_args(arguments).role
    match role:
        case "setup":
            set_up(app, load(SetupSettings), scripts)
        case "check":
            raise SystemExit(check(load(CheckSettings), service=app.service, scripts=scripts))
        case "worker":
            raise SystemExit(work(app, load(settings)))
        case _:
            asyncio.run(relay(app, load(RelaySettings)))


def set_up(app: WorkerApp, settings: SetupSettings, scripts: Path | None) -> None:
    """Migrate the database, declare the topology, and announce the manifest; safe to repeat."""
    from taskmesh.management import Management
    from taskmesh.relay import announce_once
    from taskmesh.topology import declare, worker_topology

    def declare_topology() -> None:
        with Management(settings.management_url.get_secret_value()) as management:
            declare(
                worker_topology(app.service, app.listens_to()),
                amqp_url=settings.amqp_url.get_secret_value(),
                management=management,
            )

    logs.configure(settings.log_format, settings.log_level, app.service, "setup")
    patiently(lambda: migrate(settings.database_url, scripts=scripts), seconds=settings.setup_wait_seconds)
    patiently(declare_topology, seconds=settings.setup_wait_seconds)
    asyncio.run(announce_once(settings.amqp_url.get_secret_value(), app.manifest()))


def work(app: WorkerApp, settings: WorkerSettings) -> int:
    """Run tasks until told to stop; returns the process's exit code."""
    from celery import signals
    from celery.apps import worker as celery_program

    from taskmesh.worker.measuring import PoolMetrics, show_slots
    from taskmesh.worker.shutdown import Shutdown
    from taskmesh.worker.watchdog import Watchdog

    logs.configure(settings.log_format, settings.log_level, app.service, "worker")
    app.configure(settings)

    # A receiver here keeps Celery from setting up logging of its own.
    signals.setup_logging.connect(lambda **_: None, weak=False)

    prefork = settings.worker_pool == "prefork"
    measured = PoolMetrics(f"{app.service}-worker", settings) if prefork else None
    show_slots(settings)

    def start(**_: Any) -> None:
        if measured is not None:
            measured.enter_child()
        telemetry.start(f"{app.service}-worker", "worker", settings, with_metrics=not prefork)
        try:
            app.start_process()
        except Exception as error:
            # Celery would log it and let the process take tasks half-equipped.
            logger.exception("process could not be started")
            raise SystemExit(1) from error

    def stop(**_: Any) -> None:
        telemetry.stop()

    if prefork:
        # After the fork: an exporter's thread and a database connection do not survive one.
        signals.worker_process_init.connect(start, weak=False)
        signals.worker_process_shutdown.connect(stop, weak=False)
    else:
        signals.worker_init.connect(start, weak=False)
        signals.worker_shutdown.connect(stop, weak=False)
    health = Health(settings.health_dir, f"{app.service}-worker")
    # Celery writes to standard output from its signal handlers, and its pool to standard error, both in forms of their
    # own.
    celery_program.safe_say = lambda *_, **__: None
    pool_logger = logging.getLogger("multiprocessing")
    pool_logger.handlers[:] = logging.getLogger().handlers
    pool_logger.setLevel(logging.WARNING)
    worker = app.Worker(
        pool=settings.worker_pool,
        concurrency=settings.worker_concurrency,
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
        quiet=True,
    )
    shutdown = Shutdown(app, worker, seconds=settings.soft_shutdown_seconds)
    shutdown.install()
    if not prefork:
        Watchdog(app, shutdown, seconds=settings.soft_shutdown_seconds).start()
    # Pool children inherit it.
    garbage.spare_the_program()
    try:
        worker.start()
    finally:
        shutdown.take_back_starts()
        if measured is not None:
            measured.stop()
        health.stopped()
    return int(worker.exitcode or 0)


async def relay(app: WorkerApp, settings: RelaySettings) -> None:
    """Publish what the service's transactions wrote, and announce the service, until told to stop."""
    from taskmesh.control import ControlConsumer
    from taskmesh.relay import Relay, ServiceHooks

    logs.configure(settings.log_format, settings.log_level, app.service, "relay")
    telemetry.start(f"{app.service}-worker", "relay", settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = async_engine(settings.database_url, pool_size=2)
    garbage.spare_the_program()
    try:
        await Relay(
            engine,
            settings.amqp_url,
            app.service,
            Health(settings.health_dir, f"{app.service}-relay"),
            ServiceHooks(app.service),
            batch_size=settings.relay_batch_size,
            poll_seconds=settings.relay_poll_seconds,
            announce=app.manifest,
            announce_seconds=settings.announce_seconds,
            companions=[ControlConsumer(engine, settings.amqp_url, app.service).run],
        ).run(stop)
    finally:
        await engine.dispose()
        telemetry.stop()
