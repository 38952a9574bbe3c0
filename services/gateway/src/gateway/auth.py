"""API keys: who may do what.

A key reads `tm_<id>_<secret>`. The id finds the row; the secret is known here only by its SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.identifiers import uuid7
from gateway.models import api_keys
from gateway.problems import Problem
from gateway.scopes import Scope
from gateway.transactions import transaction
from taskmesh.errors import NotFound

logger = logging.getLogger(__name__)

PREFIX: Final = "tm"
SECRET_BYTES: Final = 32
CACHE_SECONDS: Final = 5.0
"""How long a revoked key may still be taken for good."""
CACHE_MAX_KEYS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Whoever holds the key of a request."""

    id: UUID
    name: str
    scopes: frozenset[str]

    def may_read(self, task: Row[Any]) -> bool:
        """Whether payload and result of the task are for its eyes: it may read tasks, or has sent this payload."""
        # Another try has the payload of whoever sent the first.
        return Scope.TASKS_READ in self.scopes or (task.api_key_id == self.id and task.retry_of is None)


@dataclass(frozen=True, slots=True)
class _Entry:
    secret_sha256: bytes
    client: Client | None
    """None for a key that is unknown or revoked."""
    read_at: float


_UNKNOWN: Final = hashlib.sha256(b"").digest()


class Authenticator:
    """Looks keys up in the database, and remembers the answers, bad ones too, for five seconds."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._entries: dict[UUID, _Entry] = {}

    async def authenticate(self, token: str) -> Client:
        """The client behind a key.

        Raises:
            Problem: `unauthenticated`; for every reason the same.
            DatabaseUnavailable: The key has to be looked up and cannot be.
        """
        key_id, secret = _parse(token)
        entry = self._entries.get(key_id)
        if entry is None or time.monotonic() - entry.read_at > CACHE_SECONDS:
            entry = await self._look_up(key_id)
        # Compared even for an unknown key, so that the time taken tells nothing about which ids exist.
        matches = hmac.compare_digest(entry.secret_sha256, hashlib.sha256(secret.encode()).digest())
        if entry.client is None or not matches:
            raise _unauthenticated()
        return entry.client

    async def authorize(self, token: str, scope: Scope) -> Client:
        """The client behind a key that has the scope.

        Raises:
            Problem: `unauthenticated` or `forbidden`.
            DatabaseUnavailable: As of `authenticate`.
        """
        client = await self.authenticate(token)
        if scope not in client.scopes:
            raise Problem("forbidden", f"the API key lacks the scope {scope.value}")
        return client

    async def _look_up(self, key_id: UUID) -> _Entry:
        async with transaction(self._engine) as connection:
            statement = select(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            row = (await connection.execute(statement)).one_or_none()
        if len(self._entries) >= CACHE_MAX_KEYS:
            self._entries.clear()
        entry = self._entries[key_id] = _entry_of(row)
        return entry


def _entry_of(row: Row[Any] | None) -> _Entry:
    if row is None:
        return _Entry(_UNKNOWN, None, time.monotonic())
    client = Client(id=row.id, name=row.name, scopes=frozenset(row.scopes))
    return _Entry(bytes(row.secret_sha256), client, time.monotonic())


def _parse(token: str) -> tuple[UUID, str]:
    prefix, _, rest = token.partition("_")
    key_id, _, secret = rest.partition("_")
    try:
        if prefix == PREFIX and secret:
            return UUID(hex=key_id), secret
    except ValueError:
        pass
    raise _unauthenticated()


def _unauthenticated() -> Problem:
    return Problem(
        "unauthenticated", "a valid API key is needed", headers={"WWW-Authenticate": 'Bearer realm="taskmesh"'}
    )


_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="`Authorization: Bearer <api key>`")


def requires(scope: Scope) -> Callable[..., Coroutine[Any, Any, Client]]:
    """A dependency that gives the client of a request, whose key must have the scope."""

    async def authorize(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Client:
        if credentials is None:
            raise _unauthenticated()
        authenticator: Authenticator = request.app.state.gateway.authenticator
        return await authenticator.authorize(credentials.credentials, scope)

    return authorize


TaskWriter = Annotated[Client, Depends(requires(Scope.TASKS_WRITE))]
TaskReader = Annotated[Client, Depends(requires(Scope.TASKS_READ))]
TypeReader = Annotated[Client, Depends(requires(Scope.TYPES_READ))]
ScheduleReader = Annotated[Client, Depends(requires(Scope.SCHEDULES_READ))]
ScheduleWriter = Annotated[Client, Depends(requires(Scope.SCHEDULES_WRITE))]
ServiceReader = Annotated[Client, Depends(requires(Scope.SERVICES_READ))]
ServiceWriter = Annotated[Client, Depends(requires(Scope.SERVICES_WRITE))]
DeadLetterReader = Annotated[Client, Depends(requires(Scope.DEAD_LETTERS_READ))]
DeadLetterWriter = Annotated[Client, Depends(requires(Scope.DEAD_LETTERS_WRITE))]
ReconciliationReader = Annotated[Client, Depends(requires(Scope.RECONCILIATION_READ))]
ReconciliationWriter = Annotated[Client, Depends(requires(Scope.RECONCILIATION_WRITE))]


async def create_key(connection: AsyncConnection, name: str, scopes: Sequence[Scope]) -> str:
    """Make a key and return it: the only time that its secret is seen."""
    key_id, secret = uuid7(), secrets.token_urlsafe(SECRET_BYTES)
    await connection.execute(
        insert(api_keys).values(
            id=key_id,
            name=name,
            secret_sha256=hashlib.sha256(secret.encode()).digest(),
            scopes=[scope.value for scope in scopes],
        )
    )
    return f"{PREFIX}_{key_id.hex}_{secret}"


async def list_keys(connection: AsyncConnection) -> Sequence[Row[*tuple[Any, ...]]]:
    """All keys, revoked ones too, without their secrets."""
    columns = (api_keys.c.id, api_keys.c.name, api_keys.c.scopes, api_keys.c.created_at, api_keys.c.revoked_at)
    return (await connection.execute(select(*columns).order_by(api_keys.c.id))).all()


async def revoke_key(connection: AsyncConnection, key_id: UUID) -> None:
    """Make a key worthless, within five seconds, for good.

    Raises:
        NotFound: There is none, or it is revoked already.
    """
    statement = (
        update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(api_keys.c.id)
    )
    if (await connection.execute(statement)).one_or_none() is None:
        raise NotFound("there is no such key, or it is revoked already")
