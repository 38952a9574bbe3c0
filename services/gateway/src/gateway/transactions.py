"""The gateway's engine, and the one place where a database that is away becomes an error of the mesh."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import lru_cache

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskmesh import database
from taskmesh.errors import DatabaseUnavailable

CONNECT_SECONDS = 2
STATEMENT_SECONDS = 10
# A server that is reachable but hangs answers no statement time-out; this one runs here.
TRANSACTION_SECONDS = 15
RETRY_AFTER = timedelta(seconds=2)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def open_engine(url: SecretStr, *, pool_size: int, wait_seconds: float, role: str) -> AsyncEngine:
    """An engine that gives up early, so that a caller hears 503 rather than nothing."""
    return database.async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=wait_seconds,
        pool_recycle=1800,
        # Statement parameters hold payloads, and the text of an error may reach a log.
        hide_parameters=True,
        json_serializer=_dumps,
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "application_name": f"gateway-{role}",
            "options": f"-c statement_timeout={STATEMENT_SECONDS}s -c idle_in_transaction_session_timeout=30s",
        },
    )


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction, committed when the block ends well.

    Raises:
        DatabaseUnavailable: The database is away, has no free connection, or does not answer. When COMMIT was under
            way the outcome is unknown; only a repetition under the same idempotency key is safe.
    """
    async with _within_bounds(), engine.begin() as connection:
        yield connection


@asynccontextmanager
async def single_statement(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection for one statement, which is a transaction by itself: BEGIN and COMMIT would be two more round trips.

    Raises:
        DatabaseUnavailable: As of `transaction`.
    """
    async with _within_bounds(), _autocommit(engine).connect() as connection:
        yield connection


@lru_cache(maxsize=4)
def _autocommit(engine: AsyncEngine) -> AsyncEngine:
    """The same engine, with the same connections."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


@asynccontextmanager
async def _within_bounds() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(TRANSACTION_SECONDS):
            yield
    except TimeoutError as error:
        raise DatabaseUnavailable("the database did not answer in time", retry_after=RETRY_AFTER) from error
    except SQLAlchemyError as error:
        if database.is_unavailable(error):
            raise DatabaseUnavailable("the database cannot be used at the moment", retry_after=RETRY_AFTER) from error
        raise
