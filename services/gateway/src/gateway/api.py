"""The HTTP application: which routes there are, and what every request passes through on its way to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from gateway import problems, tracing
from gateway.auth import Authenticator
from gateway.bodies import BodyLimit
from gateway.catalogue import Catalogue
from gateway.dependencies import Gateway
from gateway.openapi import LiveOpenApi
from gateway.routes import documents, probes, schedules, tasks, types
from gateway.settings import ApiSettings
from gateway.transactions import open_engine
from gateway.waiting import Doorbell
from taskmesh.health import Health
from taskmesh.telemetry import release

BEAT_SECONDS = 5


def create_app(settings: ApiSettings, health: Health | None = None) -> FastAPI:
    """The application. It connects when it is first used, so without a database it starts and says so.

    Args:
        health: Ready once requests can be taken, alive while the event loop turns.
    """
    engine = open_engine(
        settings.database_url,
        pool_size=settings.database_pool_size,
        wait_seconds=settings.database_wait_seconds,
        role="api",
    )
    gateway = Gateway(
        engine=engine,
        catalogue=Catalogue(engine),
        authenticator=Authenticator(engine),
        doorbell=Doorbell(settings.database_url),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        companions = [asyncio.create_task(gateway.doorbell.run()), asyncio.create_task(_beat(health))]
        try:
            yield
        finally:
            gateway.doorbell.stop()
            for companion in companions:
                companion.cancel()
            await asyncio.gather(*companions, return_exceptions=True)
            await engine.dispose()

    app = FastAPI(title="Taskmesh gateway", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway = gateway
    app.state.openapi = LiveOpenApi(app, release())
    for router in (tasks.router, types.router, schedules.router, probes.router, documents.router):
        app.include_router(router)
    problems.install(app)
    # The last one added is the first that a request meets.
    app.add_middleware(BodyLimit)
    app.add_middleware(problems.UnexpectedErrors)
    app.add_middleware(tracing.TraceHeader)
    tracing.instrument(app)
    return app


async def _beat(health: Health | None) -> None:
    if health is None:
        return
    health.ready()
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        health.beat()
