"""PostgreSQL: engines, and migrations that need no Alembic environment of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy.exc
from psycopg import errors as postgres_errors
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

# Alembic is imported where it migrates, or looks whether somebody has: the roles that work do without its tenth of a
# second and its 8 MiB.
if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

LIBRARY_SCRIPTS = Path(__file__).parent / "migrations"
LIBRARY_VERSION_TABLE = "taskmesh_version"
SERVICE_VERSION_TABLE = "alembic_version"

# One setup at a time; any constant will do as long as nothing else in the database locks it.
MIGRATION_LOCK = 7_265_726_473

# PostgreSQL is away, starting, stopping, full, or chose this transaction to give way to another.
UNAVAILABLE = (
    postgres_errors.AdminShutdown,
    postgres_errors.CannotConnectNow,
    postgres_errors.ConnectionException,
    postgres_errors.CrashShutdown,
    postgres_errors.DeadlockDetected,
    postgres_errors.IdleInTransactionSessionTimeout,
    postgres_errors.InsufficientResources,
    postgres_errors.LockNotAvailable,
    postgres_errors.QueryCanceled,
    postgres_errors.ReadOnlySqlTransaction,
    postgres_errors.SerializationFailure,
)

RECONNECT_REFUSED = "8s2b"
"""SQLAlchemy's code: https://docs.sqlalchemy.org/en/20/errors.html#error-8s2b"""

# A network that swallows packets ends a connection within half a minute; by itself Linux waits for hours.
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}


def driver_url(url: SecretStr | str) -> URL:
    """The URL with SQLAlchemy's name for psycopg 3, which serves both sync and async."""
    plain = url.get_secret_value() if isinstance(url, SecretStr) else url
    return make_url(plain).set(drivername="postgresql+psycopg")


def sync_engine(url: SecretStr | str, **options: Any) -> Engine:
    """An engine that connects when first used."""
    return create_engine(driver_url(url), **_options(options))


def async_engine(url: SecretStr | str, **options: Any) -> AsyncEngine:
    """An async engine that connects when first used."""
    return create_async_engine(driver_url(url), **_options(options))


def _options(options: dict[str, Any]) -> dict[str, Any]:
    # Names the client in pg_stat_activity; five seconds to connect, so that a lost host is an error and not a wait.
    connect = {"connect_timeout": 5, "application_name": "taskmesh", **KEEPALIVE, **options.pop("connect_args", {})}
    # An SQL error is logged with its statement, and never with its parameters: those are payloads.
    return {"connect_args": connect, "hide_parameters": True, **options}


def is_unavailable(error: BaseException) -> bool:
    """True if the same transaction may succeed when it is tried again."""
    if isinstance(error, sqlalchemy.exc.TimeoutError):
        return True
    if isinstance(error, sqlalchemy.exc.PendingRollbackError):
        # The connection was lost earlier in this transaction, and somebody went on; else, it is a mistake.
        return error.code == RECONNECT_REFUSED
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        if error.connection_invalidated:
            return True
        cause = error.orig
        sqlstate = getattr(cause, "sqlstate", None)
        # Without an SQLSTATE the server never answered: refused, reset, or timed out.
        return isinstance(cause, UNAVAILABLE) or (
            isinstance(cause, postgres_errors.OperationalError) and sqlstate is None
        )
    return isinstance(error, UNAVAILABLE) or (
        isinstance(error, postgres_errors.OperationalError) and error.sqlstate is None
    )


def reason_of(error: BaseException) -> str:
    """What stands against a connection in the driver's own words, without addresses; of any other error, its class.

    `SSL error: certificate verify failed` tells an operator what to mend, and `OperationalError` does not. Errors of
    statements quote rows, so of them nothing but the class is told.
    """
    cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) and error.orig is not None else error
    if isinstance(cause, postgres_errors.OperationalError) and cause.sqlstate is None:
        # One line for each address of the host, such as: connection to server at "::1", port 5432 failed: why
        lines = [line.rpartition(" failed: ") for line in str(cause).splitlines()]
        if reasons := dict.fromkeys(reason.strip() for _, found, reason in lines if found):
            return "; ".join(reasons)
    return type(cause).__name__


def migrate(url: SecretStr | str, *, scripts: Path | None) -> None:
    """Bring a service's database to this release's schema: the library's tables, then the service's own.

    A newer schema is left as it is.

    Args:
        url: The owner's URL, direct and not through a transaction pooler.
        scripts: A folder with Alembic revisions in `versions/`; None for a service without tables of its own.
    """
    engine = create_engine(driver_url(url), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            # A session lock, because each migration commits by itself.
            connection.execute(text("select pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
            # A migration that cannot have its lock must give way rather than queue all traffic behind it.
            connection.execute(text("set lock_timeout = '4s'"))
            connection.commit()
            for folder, table in ((LIBRARY_SCRIPTS, LIBRARY_VERSION_TABLE), (scripts, SERVICE_VERSION_TABLE)):
                if folder is not None:
                    _upgrade(connection, folder, table)
    finally:
        engine.dispose()


def is_migrated(url: SecretStr | str, *, scripts: Path | None) -> bool:
    """True if the schema is at least that of this release; a newer one suits the release before it, too.

    Needs no more rights than to read, and changes nothing.

    Args:
        url: Any role's URL.
        scripts: As for `migrate`.
    """
    tables = {LIBRARY_VERSION_TABLE: LIBRARY_SCRIPTS, SERVICE_VERSION_TABLE: scripts}
    engine = sync_engine(url, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            return all(_is_upgraded(connection, folder, table) for table, folder in tables.items() if folder)
    finally:
        engine.dispose()


def _is_upgraded(connection: Connection, scripts: Path, version_table: str) -> bool:
    from alembic.runtime.migration import MigrationContext

    directory = _directory(scripts)
    context = MigrationContext.configure(connection, opts={"version_table": version_table})
    current = context.get_current_revision()
    if current is None:
        return directory.get_current_head() is None
    # Revisions are in one line: what this release does not know came after it.
    known = {each.revision for each in directory.walk_revisions()}
    return current == directory.get_current_head() or current not in known


def _directory(scripts: Path) -> ScriptDirectory:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def _upgrade(connection: Connection, scripts: Path, version_table: str) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

    # A release that was rolled back finds the schema of the one after it, which suits it as it is.
    is_there = _is_upgraded(connection, scripts, version_table)
    connection.commit()
    if is_there:
        return
    directory = _directory(scripts)

    def steps(revision: Any, _: MigrationContext) -> Any:
        return directory._upgrade_revs("head", revision)  # noqa: SLF001 - what alembic.command.upgrade itself calls

    with EnvironmentContext(Config(), directory, fn=steps, destination_rev="head") as environment:
        environment.configure(connection=connection, version_table=version_table, transaction_per_migration=True)
        with environment.begin_transaction():
            environment.run_migrations()
    connection.commit()
