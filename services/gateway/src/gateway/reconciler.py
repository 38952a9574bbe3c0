"""The reconciler role: looks at the broker every few seconds, and audits the ledger every minute or when asked to.

Any number of them may run. One holds a lock of the database and works; the others wait for it to go away. The lock's
connection is also the one that listens, so whoever has lost the one does not believe to have the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.gauges import Gauges
from gateway.models import AUDITS_CHANNEL, SIGHTINGS_CHANNEL
from gateway.observing import Observer
from gateway.reconciling import Reconciler
from gateway.settings import ReconcilerSettings
from gateway.transactions import CONNECT_SECONDS, open_engine
from taskmesh import amqp
from taskmesh.database import KEEPALIVE
from taskmesh.errors import DatabaseUnavailable
from taskmesh.health import Health
from taskmesh.listening import ListeningConnection

logger = logging.getLogger(__name__)

# Any constant will do as long as nothing else in the database locks it.
LEADER_LOCK: Final = 7_265_726_474


async def run(settings: ReconcilerSettings, stop: asyncio.Event) -> None:
    """Observe and audit until `stop` is set, whenever no other replica does."""
    engine = open_engine(settings.database_url, pool_size=3, wait_seconds=5, role="reconciler")
    try:
        await Role(engine, settings).run(stop)
    finally:
        await engine.dispose()


class Role:
    """One replica."""

    def __init__(self, engine: AsyncEngine, settings: ReconcilerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._health = Health(settings.health_dir, "gateway-reconciler")
        self._answered = asyncio.Event()
        self._asked = asyncio.Event()
        self._wanted_grace: list[float] = []
        self._gauges = Gauges(engine)

    async def run(self, stop: asyncio.Event) -> None:
        """Work while this replica holds the lock, and wait for it otherwise, until `stop` is set."""
        stopping = asyncio.create_task(stop.wait())
        trying = asyncio.create_task(self._keep_trying())
        try:
            await asyncio.wait({stopping, trying}, return_when=asyncio.FIRST_COMPLETED)
            if trying.done():
                # Only a mistake ends it; the process ends as well, and is started again.
                await trying
        finally:
            for task in (stopping, trying):
                task.cancel()
            await asyncio.gather(stopping, trying, return_exceptions=True)
            self._health.stopped()

    async def _keep_trying(self) -> None:
        is_down = False
        while True:
            try:
                async with self._connect() as connection:
                    if is_down:
                        logger.info("database available")
                        is_down = False
                    await self._wait_for_lock(connection)
                    logger.info("reconciler leads")
                    await self._lead(connection)
            except (psycopg.Error, OSError) as error:
                if not is_down:
                    logger.warning("leadership interrupted", extra={"exception": type(error).__qualname__})
                is_down = True
            # Whoever leads now says how things are.
            self._gauges.hide()
            self._health.beat()
            await asyncio.sleep(min(self._settings.observe_seconds, 2.0))

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        connection = await ListeningConnection.connect(
            make_conninfo(self._settings.database_url.get_secret_value(), **KEEPALIVE),
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            application_name="gateway-reconciler-leader",
        )
        async with connection:
            yield connection

    async def _wait_for_lock(self, connection: psycopg.AsyncConnection[Any]) -> None:
        while True:
            cursor = await connection.execute("select pg_try_advisory_lock(%s)", [LEADER_LOCK])
            row = await cursor.fetchone()
            # One that waits for its turn is as ready as one that works.
            self._health.ready()
            if row is not None and row[0]:
                return
            await asyncio.sleep(self._settings.observe_seconds)

    async def _lead(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Observe and audit until the lock's connection is lost."""
        settings = self._settings
        vhost = amqp.parameters(settings.amqp_url, name="gateway-reconciler").virtual_host
        observer = Observer(self._engine, settings.management_url, vhost)
        reconciler = Reconciler(
            self._engine,
            answered=self._answered,
            redrive=settings.redrive,
            fresh=timedelta(seconds=max(30.0, 3 * settings.observe_seconds)),
        )
        observed = asyncio.Event()
        companions = [
            asyncio.create_task(self._observe(observer, observed)),
            asyncio.create_task(self._audit(reconciler, observed)),
        ]
        try:
            await self._listen(connection)
        finally:
            for companion in companions:
                companion.cancel()
            await asyncio.gather(*companions, return_exceptions=True)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        for channel in (AUDITS_CHANNEL, SIGHTINGS_CHANNEL):
            await connection.execute(f"listen {channel}")
        async for notification in connection.notifies():
            if notification.channel == SIGHTINGS_CHANNEL:
                self._answered.set()
                continue
            with contextlib.suppress(ValueError):
                grace = float(notification.payload or self._settings.reconcile_grace_seconds)
                if math.isfinite(grace) and grace >= 0:
                    self._wanted_grace.append(grace)
                    self._asked.set()

    async def _observe(self, observer: Observer, observed: asyncio.Event) -> None:
        while True:
            await _survives("look at the broker", observer.look)
            observed.set()
            self._health.beat()
            await _survives("look at the work", self._gauges.look)
            await asyncio.sleep(self._settings.observe_seconds)

    async def _audit(self, reconciler: Reconciler, observed: asyncio.Event) -> None:
        await observed.wait()
        while True:
            self._asked.clear()
            graces, self._wanted_grace = self._wanted_grace, []
            grace = timedelta(seconds=min(graces, default=self._settings.reconcile_grace_seconds))

            async def audit(grace: timedelta = grace) -> bool:
                self._gauges.show_audit(await reconciler.audit(grace=grace))
                return True

            done = await _survives("audit", audit)
            with contextlib.suppress(TimeoutError):
                pause_seconds = self._settings.reconcile_interval_seconds if done else self._settings.observe_seconds
                await asyncio.wait_for(self._asked.wait(), pause_seconds)


async def _survives(message: str, work: Callable[[], Awaitable[bool]]) -> bool:
    """Do it; False if it said so, or if it failed, which is logged."""
    try:
        return await work()
    except DatabaseUnavailable as error:
        logger.warning("reconciler interrupted", extra={"reason": str(error), "what": message})
    except Exception:
        # One of the loops that may catch everything: what is wrong with one audit must not end the next ones.
        logger.exception("reconciler failed", extra={"what": message})
    return False
