"""`python -m gateway setup|check|api|projector|scheduler|relay|reconciler`: the roles; `keys` hands out API keys."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from gateway.scopes import Scope
from gateway.settings import (
    ApiSettings,
    GatewayRelaySettings,
    GatewaySetupSettings,
    KeysSettings,
    ProjectorSettings,
    ReconcilerSettings,
    SchedulerSettings,
)
from taskmesh import garbage, logs, telemetry
from taskmesh.checking import check, patiently
from taskmesh.health import Health
from taskmesh.settings import CheckSettings, ServiceSettings, load
from taskmesh.telemetry import release

logger = logging.getLogger(__name__)

SERVICE = "gateway"
SCRIPTS = Path(__file__).parent / "migrations"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one role until it is told to stop, or one command."""
    options = _parser().parse_args(arguments)
    match options.role:
        case "setup":
            set_up(load(GatewaySetupSettings))
        case "check":
            raise SystemExit(check(load(CheckSettings), service=SERVICE, scripts=SCRIPTS))
        case "api":
            serve(load(ApiSettings))
        case "projector":
            projector = load(ProjectorSettings)
            _run("projector", projector, lambda stop: project(projector, stop))
        case "scheduler":
            scheduler = load(SchedulerSettings)
            _run("scheduler", scheduler, lambda stop: schedule(scheduler, stop))
        case "relay":
            relaying = load(GatewayRelaySettings)
            _run("relay", relaying, lambda stop: relay(relaying, stop))
        case "reconciler":
            reconciling = load(ReconcilerSettings)
            _run("reconciler", reconciling, lambda stop: reconcile(reconciling, stop))
        case _:
            asyncio.run(keys(load(KeysSettings), options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway", description="The gateway of Taskmesh.")
    parser.add_argument("--version", action="version", version=release())
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("setup", help="migrate the database and declare the topology; safe to repeat")
    roles.add_parser("check", help="say whether setup is done for this release; changes nothing")
    roles.add_parser("api", help="serve HTTP")
    roles.add_parser("projector", help="write what workers report into the ledger")
    roles.add_parser("scheduler", help="fire schedules")
    roles.add_parser("relay", help="publish the outbox")
    roles.add_parser("reconciler", help="watch the queues, and account for every task")
    commands = roles.add_parser("keys", help="API keys").add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", required=True, help="who will hold it")
    create.add_argument("--scopes", required=True, type=_scopes, help="for example tasks:write,tasks:read,types:read")
    commands.add_parser("list", help="list keys without their secrets")
    revoke = commands.add_parser("revoke", help="make a key worthless within five seconds")
    revoke.add_argument("id", type=UUID)
    return parser


def set_up(settings: GatewaySetupSettings) -> None:
    """Migrate the database and declare what the gateway owns on the broker; safe to repeat."""
    from taskmesh.database import migrate
    from taskmesh.management import Management
    from taskmesh.topology import declare, gateway_topology

    def declare_topology() -> None:
        with Management(settings.management_url.get_secret_value()) as management:
            declare(gateway_topology(), amqp_url=settings.amqp_url.get_secret_value(), management=management)

    logs.configure(settings.log_format, settings.log_level, SERVICE, "setup")
    patiently(lambda: migrate(settings.database_url, scripts=SCRIPTS), seconds=settings.setup_wait_seconds)
    patiently(declare_topology, seconds=settings.setup_wait_seconds)


def serve(settings: ApiSettings) -> None:
    """Serve HTTP until told to stop; then answer what waits, end streams, and finish what has begun."""
    import uvicorn

    from gateway.api import create_app, http_config

    logs.configure(settings.log_format, settings.log_level, SERVICE, "api")
    # It tells of its own coming and going only.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    telemetry.start(SERVICE, "api", settings)
    health = Health(settings.health_dir, f"{SERVICE}-api")
    app = create_app(settings, health)

    class Server(uvicorn.Server):
        """Stops on a signal, after sending those home who wait for a task.

        uvicorn's own way is to raise the signal again once it has stopped, which would end the process before it has
        exported its last spans.
        """

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
            yield

        def _stop(self, number: int) -> None:
            app.state.gateway.doorbell.stop()
            self.handle_exit(number, None)

    config = http_config(app, settings)
    # Bound here and not by uvicorn, so that the readiness file appears when connections are taken.
    listener = config.bind_socket()
    host, port = listener.getsockname()[:2]
    garbage.spare_the_program()
    logger.info("serving", extra={"url": f"http://{host}:{port}"})
    try:
        Server(config).run(sockets=[listener])
    finally:
        health.stopped()
        telemetry.stop()


async def project(settings: ProjectorSettings, stop: asyncio.Event) -> None:
    """Write what workers and the broker report into the ledger."""
    from gateway.projector import QUEUES, Projector, keep_house
    from gateway.transactions import open_engine
    from taskmesh.consuming import BatchConsumer

    engine = open_engine(settings.database_url, pool_size=2, wait_seconds=5, role="projector")
    projector = Projector(engine)
    consumer = BatchConsumer(
        settings.amqp_url,
        QUEUES,
        projector.handle,
        name="gateway-projector",
        batch_size=settings.projector_batch_size,
        health=Health(settings.health_dir, f"{SERVICE}-projector"),
    )
    housekeeping = asyncio.create_task(
        keep_house(
            engine,
            stop,
            forget_keys_after=timedelta(hours=settings.idempotency_key_hours),
            forget_letters_after=timedelta(days=settings.dead_letter_days),
        )
    )
    keeping = asyncio.create_task(projector.keep_run_times(stop))
    garbage.spare_the_program()
    try:
        await consumer.run(stop)
    finally:
        for companion in (housekeeping, keeping):
            companion.cancel()
        await asyncio.gather(housekeeping, keeping, return_exceptions=True)
        await engine.dispose()


async def schedule(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Fire schedules."""
    from gateway import scheduler

    await scheduler.run(settings, stop)


async def relay(settings: GatewayRelaySettings, stop: asyncio.Event) -> None:
    """Publish accepted tasks when they are due."""
    from gateway.relaying import GatewayHooks
    from gateway.transactions import open_engine
    from taskmesh.relay import Relay

    engine = open_engine(settings.database_url, pool_size=2, wait_seconds=5, role="relay")
    garbage.spare_the_program()
    try:
        await Relay(
            engine,
            settings.amqp_url,
            SERVICE,
            Health(settings.health_dir, f"{SERVICE}-relay"),
            GatewayHooks(),
            batch_size=settings.relay_batch_size,
            poll_seconds=settings.relay_poll_seconds,
        ).run(stop)
    finally:
        await engine.dispose()


async def reconcile(settings: ReconcilerSettings, stop: asyncio.Event) -> None:
    """Watch the queues, and account for every task."""
    from gateway import reconciler

    await reconciler.run(settings, stop)


async def keys(settings: KeysSettings, options: argparse.Namespace) -> None:
    """Create, list or revoke API keys; a new key is printed once, and nowhere else."""
    from gateway import auth
    from gateway.transactions import open_engine, transaction
    from taskmesh.errors import TaskmeshError

    engine = open_engine(settings.database_url, pool_size=1, wait_seconds=5, role="keys")
    try:
        async with transaction(engine) as connection:
            match options.command:
                case "create":
                    print(await auth.create_key(connection, options.name, options.scopes))
                case "revoke":
                    await auth.revoke_key(connection, options.id)
                case _:
                    for row in await auth.list_keys(connection):
                        state = f"revoked {row.revoked_at:%Y-%m-%d}" if row.revoked_at else "valid"
                        print(row.id, row.name, ",".join(row.scopes), f"{row.created_at:%Y-%m-%d}", state, sep="\t")
    except TaskmeshError as error:
        sys.exit(f"gateway keys: {error}")
    finally:
        await engine.dispose()


def _scopes(text: str) -> list[Scope]:
    try:
        return [Scope(name.strip()) for name in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(Scope)}") from None


def _run(role: str, settings: ServiceSettings, work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run a role that has no server of its own, until SIGTERM or SIGINT."""
    logs.configure(settings.log_format, settings.log_level, SERVICE, role)
    telemetry.start(SERVICE, role, settings)

    async def until_stopped() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(stop)

    try:
        asyncio.run(until_stopped())
    finally:
        telemetry.stop()


if __name__ == "__main__":
    main()
