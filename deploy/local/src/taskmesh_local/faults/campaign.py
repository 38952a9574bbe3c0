"""One campaign: a mesh of its own, a load, a schedule of faults, healing, quiet, and the invariants."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from taskmesh.parts import PartMissing
from taskmesh.parts.postgres import Postgres
from taskmesh.parts.rabbitmq import RabbitMQ
from taskmesh_local import backing, environment
from taskmesh_local.collector import collecting
from taskmesh_local.faults import invariants
from taskmesh_local.faults.audit import reconcile
from taskmesh_local.faults.evidence import Databases, Evidence, queues
from taskmesh_local.faults.injectors import Injectors
from taskmesh_local.faults.journal import Journal
from taskmesh_local.faults.killed import told_by_workers
from taskmesh_local.faults.load import Load
from taskmesh_local.faults.options import Options
from taskmesh_local.faults.orders import orders
from taskmesh_local.faults.proxies import Proxies
from taskmesh_local.faults.quiet import Watch
from taskmesh_local.faults.report import Report
from taskmesh_local.faults.supervisor import Supervisor
from taskmesh_local.folders import Folders
from taskmesh_local.mesh import Mesh
from taskmesh_local.progress import Progress
from taskmesh_local.state import locked

SETTLE_SECONDS = 5.0
"""A broker that is killed right after its queues were declared may lose one; that is set-up, not operation."""
LIMIT_SECONDS = 600.0
EXPORT_SECONDS = 3.0
EXPLAINED = 10
"""How many unfinished tasks the gateway is asked about."""


async def run(options: Options, folder: Path, console: Console) -> Report:
    """Run a campaign in an empty folder, and return what it found; nothing of it runs afterwards.

    Raises:
        PartMissing: A program is missing.
        PartDidNotStart: The mesh did not come up in the first place.
    """
    journal = Journal(console)
    # Servers that the caller's shell names are not to be harmed.
    for name in environment.FILE_NAMES:
        os.environ.pop(name, None)
    folders = Folders(folder)
    spans = folder / "spans"
    with collecting(spans) as endpoint, locked(folders) as state:
        fleet = options.fleet(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        async with contextlib.AsyncExitStack() as stack:
            detours: list[Proxies] = []
            mesh = Mesh(
                state,
                Progress(console),
                fleet,
                by_way_of=lambda url: detours[0].detour(url) if detours else url,
            )
            stack.push_async_callback(asyncio.to_thread, mesh.down, purge=False)
            await asyncio.to_thread(mesh.up, ())
            database, broker = _servers(backing.postgres(state), backing.known_rabbitmq(state))
            proxies = Proxies(database_url=database.url, broker_url=broker.amqp_url)
            detours.append(await stack.enter_async_context(proxies))
            everything = [name for name in fleet.names if name != "traces"]
            await asyncio.to_thread(mesh.up, everything)
            roles = [role.name for role in fleet.roles]
            supervisor = Supervisor(mesh, state, roles, journal)
            injectors = Injectors(supervisor, proxies, database, broker, journal)
            injectors.keep_policies()
            variables = environment.read(folders.env)
            load = await stack.enter_async_context(
                Load(variables["TASKMESH_URL"], variables["TASKMESH_API_KEY"], journal)
            )
            databases = Databases(
                {service: variables[f"TASKMESH_{service.upper()}_DATABASE_URL"] for service in fleet.services}
            )
            watch = Watch(
                databases=databases,
                management_url=broker.management_url,
                supervisor=supervisor,
                journal=journal,
                limit_seconds=options.limit_seconds or max(LIMIT_SECONDS, options.seconds),
                standstill_seconds=options.standstill_seconds,
            )
            await asyncio.sleep(SETTLE_SECONDS)
            async with _running(supervisor):
                quiet = await _harm(options, journal, load, injectors, watch)
                audit = None
                if "gateway-reconciler" in roles:
                    audit = await _audit(variables, journal)
            # The last spans leave their processes now.
            await asyncio.sleep(EXPORT_SECONDS)
            logs = [(role, folders.log(role)) for role in roles]
            evidence = Evidence(
                load.books,
                databases,
                queues(broker.management_url),
                folders.mails,
                audit,
                spans,
                [*injectors.killed, *told_by_workers(logs, injectors.standstills)],
            )
            return await asyncio.to_thread(_conclude, options, evidence, injectors, supervisor, quiet=quiet)


async def _harm(options: Options, journal: Journal, load: Load, injectors: Injectors, watch: Watch) -> bool:
    """Load and faults, then healing; True when everything came to rest."""
    journal.begin()
    faults = options.faults()
    journal.note(f"load of {options.rate:g} orders/s and {len(faults)} faults for {options.seconds:.0f} s")
    examples = await load.examples(options.workers)
    ordered = orders(options.seed, seconds=options.seconds, rate=options.rate, examples=examples)
    loading = asyncio.create_task(load.run(ordered))
    try:
        await injectors.run(faults)
        await asyncio.sleep(max(0.0, options.seconds - journal.seconds))
        journal.note("healing")
        await injectors.heal()
        await loading
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    journal.note(f"every order is answered: {len(load.books.accepted)} tasks accepted")
    quiet = await watch.until_quiet()
    journal.note("quiet" if quiet else "not quiet")
    if not quiet:
        await load.explain(watch.databases.oldest_open(EXPLAINED))
    return quiet


async def _audit(variables: Mapping[str, str], journal: Journal) -> Mapping[str, Any]:
    journal.note("auditing")
    try:
        return await reconcile(variables["TASKMESH_URL"], variables["TASKMESH_API_KEY"])
    except httpx.HTTPError as error:
        journal.note(f"no audit: {error}")
        return {}


def _conclude(
    options: Options, evidence: Evidence, injectors: Injectors, supervisor: Supervisor, *, quiet: bool
) -> Report:
    findings = invariants.check(evidence)
    return Report.of(options, evidence, findings, injectors, supervisor, quiet=quiet)


def _servers(database: backing.AnyPostgres, broker: backing.AnyBroker | None) -> tuple[Postgres, RabbitMQ]:
    if not isinstance(database, Postgres) or not isinstance(broker, RabbitMQ):
        raise PartMissing("A campaign kills its servers: it needs PostgreSQL and rabbitmq-server on this machine.")
    return database, broker


@contextlib.asynccontextmanager
async def _running(supervisor: Supervisor) -> AsyncIterator[None]:
    """Watch over the roles for the block."""
    watching = asyncio.create_task(supervisor.run())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
