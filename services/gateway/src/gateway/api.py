"""The HTTP application: which routes there are, and what every request passes through on its way to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute

from gateway import problems, tracing
from gateway.auth import Authenticator
from gateway.bodies import BodyLimit
from gateway.catalogue import Catalogue
from gateway.dependencies import Gateway
from gateway.fast_path import FastPath
from gateway.headers import SafeHeaders
from gateway.openapi import LiveOpenApi
from gateway.routes import (
    dead_letters,
    documents,
    probes,
    reconciliation,
    schedules,
    services,
    task_actions,
    tasks,
    types,
)
from gateway.settings import ApiSettings
from gateway.submissions import Submissions
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
        submissions=Submissions(engine, wait_seconds=settings.database_wait_seconds),
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
            await gateway.submissions.close()
            await engine.dispose()

    app = FastAPI(
        title="Taskmesh gateway",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect has the scheme and the host that the request claims, and callers would follow it with their key.
        redirect_slashes=False,
        lifespan=lifespan,
        # Ours are in `tracing`: FastAPI's name queries and hosts, and would be a second span for each request.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.gateway = gateway
    app.state.openapi = LiveOpenApi(app, release())
    # An action of a task would otherwise be read as part of its id.
    routers = (
        task_actions.router,
        tasks.router,
        types.router,
        services.router,
        schedules.router,
        dead_letters.router,
        reconciliation.router,
        probes.router,
        documents.router,
    )
    for router in routers:
        app.include_router(router)
    app.mount("/docs/swagger-ui", documents.SWAGGER_UI)
    problems.install(app, [route for router in routers for route in router.routes])
    # The last one added is the first that a request meets.
    app.add_middleware(FastPath, gateway=gateway, route=_route_of(tasks.submit_task))
    app.add_middleware(BodyLimit)
    app.add_middleware(problems.UnexpectedErrors)
    app.add_middleware(SafeHeaders)
    app.add_middleware(tracing.Tracing)
    return app


def http_config(app: FastAPI, settings: ApiSettings) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        host=settings.http_host,
        port=settings.http_port,
        # Our own format is set already; requests are in the traces, and an access log would be the dearest line of all.
        log_config=None,
        access_log=False,
        server_header=False,
        # A request whose body came in pieces would otherwise leave its trace to the next ones on the connection.
        reset_contextvars=True,
        timeout_graceful_shutdown=settings.http_drain_seconds,
    )


def _route_of(endpoint: Callable[..., Any]) -> APIRoute:
    [route] = [each for each in tasks.router.routes if isinstance(each, APIRoute) and each.endpoint is endpoint]
    return route


async def _beat(health: Health | None) -> None:
    if health is None:
        return
    health.ready()
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        health.beat()
