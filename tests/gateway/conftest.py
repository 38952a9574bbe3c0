"""A gateway for each test: a migrated database of its own, and the real application behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

import gateway
from gateway import auth, catalogue
from gateway.api import create_app, http_config
from gateway.scopes import Scope
from gateway.settings import ApiSettings
from gateway.transactions import open_engine
from taskmesh import database
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, TypeManifest

MIGRATIONS = Path(gateway.__file__).parent / "migrations"

GREET_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 50},
        "times": {"type": "integer", "minimum": 1},
        "on": {"type": "string", "format": "date"},
        "nested": {"$ref": "#/$defs/Nested"},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"Nested": {"type": "object", "properties": {"again": {"$ref": "#/$defs/Nested"}}}},
}


def manifest(*types: TypeManifest, service: str = "greeter", announced_at: datetime | None = None) -> Manifest:
    """What a service announces; by default one command, `greeter.person.greet`, and one event that it listens to."""
    return Manifest(
        service=service,
        release="1",
        types=types or (greet(), listener()),
        announced_at=announced_at or datetime.now(UTC),
    )


def greet(**changes: Any) -> TypeManifest:
    fields: dict[str, Any] = {
        "type": "greeter.person.greet",
        "kind": TaskKind.COMMAND,
        "queue": "greeter",
        "title": "Greet a person",
        "payload_schema": GREET_SCHEMA,
        "max_attempts": 3,
    }
    return TypeManifest(**(fields | changes))


def listener() -> TypeManifest:
    return TypeManifest(
        type="billing.invoice.issued", kind=TaskKind.EVENT, queue="greeter.events", payload_schema={"type": "object"}
    )


@pytest.fixture(scope="session")
def gateway_template(postgres: str) -> Iterator[str]:
    """A migrated database that others are copied from, which is faster than migrating each."""
    from taskmesh.parts.postgres import create_database, drop_database

    name = f"gateway_template_{secrets.token_hex(6)}"
    database.migrate(create_database(postgres, name), scripts=MIGRATIONS)
    yield name
    drop_database(postgres, name)


@pytest.fixture
def gateway_url(postgres: str, gateway_template: str) -> Iterator[str]:
    """A migrated database for one test."""
    from taskmesh.parts.postgres import drop_database

    name = f"gateway_{secrets.token_hex(6)}"
    create = sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(gateway_template))
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(create)
    yield postgres.rpartition("/")[0] + f"/{name}"
    drop_database(postgres, name)


@pytest_asyncio.fixture
async def gateway_engine(gateway_url: str) -> AsyncIterator[AsyncEngine]:
    """The test's own engine, beside those of the processes it tests."""
    engine = open_engine(SecretStr(gateway_url), pool_size=5, wait_seconds=5, role="test")
    yield engine
    await engine.dispose()


@dataclass(frozen=True, kw_only=True)
class Api:
    """A running api process, as a caller and as an operator see it."""

    app: FastAPI
    url: str
    key: str
    engine: AsyncEngine
    http: httpx.AsyncClient

    async def announce(self, *manifests: Manifest) -> None:
        """Make task types known."""
        async with self.engine.begin() as connection:
            for announced in manifests or (manifest(),):
                await catalogue.store(connection, announced)

    async def new_key(self, *scopes: Scope) -> str:
        async with self.engine.begin() as connection:
            return await auth.create_key(connection, "test", scopes)

    async def submit(self, **fields: Any) -> dict[str, Any]:
        """Have a task accepted and return its view."""
        request = {"type": "greeter.person.greet", "payload": {"name": "Ada"}} | fields
        response = await self.http.post("/v1/tasks", json=request)
        assert response.status_code == 202, response.text
        view: dict[str, Any] = response.json()
        return view


@contextlib.asynccontextmanager
async def running(engine: AsyncEngine, url: str, **settings: Any) -> AsyncIterator[Api]:
    """Serve the gateway on a free port, with a key that may do everything."""
    options = {"http_host": "127.0.0.1", "http_port": 0, "amqp_url": "amqp://nobody:x@127.0.0.1:1/"} | settings
    api_settings = ApiSettings(database_url=SecretStr(url), http_drain_seconds=5, **options)
    app = create_app(api_settings)
    config = http_config(app, api_settings)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment] - pytest keeps its own
    listener_socket = config.bind_socket()
    serving = asyncio.create_task(server.serve(sockets=[listener_socket]))
    address = f"http://127.0.0.1:{listener_socket.getsockname()[1]}"
    async with engine.begin() as connection:
        key = await auth.create_key(connection, "test", list(Scope))
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=20) as http:
        try:
            yield Api(app=app, url=address, key=key, engine=engine, http=http)
        finally:
            app.state.gateway.doorbell.stop()
            server.should_exit = True
    await serving


@pytest_asyncio.fixture
async def api(gateway_engine: AsyncEngine, gateway_url: str) -> AsyncIterator[Api]:
    """A gateway that knows `greeter.person.greet`."""
    async with running(gateway_engine, gateway_url) as running_api:
        await running_api.announce()
        yield running_api


@pytest.fixture
def serve_gateway() -> Callable[..., contextlib.AbstractAsyncContextManager[Api]]:
    """Call it with a database URL and settings for a gateway that the test runs itself."""

    @contextlib.asynccontextmanager
    async def serve(url: str, **settings: Any) -> AsyncIterator[Api]:
        engine = open_engine(SecretStr(url), pool_size=2, wait_seconds=5, role="test")
        try:
            async with running(engine, url, **settings) as api:
                yield api
        finally:
            await engine.dispose()

    return serve


@pytest.fixture
def eventually() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    """Await it with a condition, plain or a coroutine function, for what gives no signal: another process, a cache."""

    async def wait(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not await _holds(condition):  # noqa: ASYNC110 - see above
                await asyncio.sleep(0.03)

    return wait


async def _holds(condition: Callable[[], Any]) -> bool:
    result = condition()
    return bool(await result if inspect.isawaitable(result) else result)
