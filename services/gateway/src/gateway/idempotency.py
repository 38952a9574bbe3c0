"""Idempotency keys: the same request, however often it is sent, is one task and gets one answer.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import delete, func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import idempotency_keys
from taskmesh.errors import ConflictError

MAX_LENGTH = 200

PATIENCE_SECONDS = 0.5
"""How long many wait together for somebody who holds the key of one of them; each of them then waits alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The name that a client has given to a request, and what it is answered when it repeats the request."""

    api_key_id: UUID
    name: str
    request_sha256: bytes
    response: bytes

    @classmethod
    def of(cls, request: BaseModel, name: str, *, api_key_id: UUID, response: bytes) -> Key:
        """The key of a request."""
        return cls(api_key_id=api_key_id, name=name, request_sha256=fingerprint(request), response=response)

    @property
    def identity(self) -> tuple[UUID, str]:
        """What no two requests share."""
        return self.api_key_id, self.name


class IdempotencyConflict(ConflictError):
    """The key was used for another request."""

    code = "idempotency_conflict"


def fingerprint(request: BaseModel) -> bytes:
    """SHA-256 of a request in canonical JSON: the order of keys and white space do not matter, all else does."""
    content = [type(request).__name__, request.model_dump(mode="json", exclude_unset=True)]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).digest()


async def claim(connection: AsyncConnection, key: Key) -> bytes | None:
    """Take the key for this request and keep its answer; if it is taken already, return the first answer.

    Must be the first write of the transaction: a second request with the key waits here until the first has committed
    or rolled back, and so writes nothing in either case that must be undone.

    Raises:
        IdempotencyConflict: The key is taken by a request that reads otherwise.
    """
    while not await claim_all(connection, [key]):
        first = await recall(connection, key.api_key_id, key.name, request_sha256=key.request_sha256)
        if first is not None:
            return first
        # It was forgotten between the two statements; it is free again.
    return None


_CLAIM = text(
    """
    with patience as materialized (select set_config('lock_timeout', :patience, true))
    insert into idempotency_keys (api_key_id, key, request_sha256, response)
    select given.*
    from patience, unnest(
        cast(:clients as uuid[]), cast(:names as text[]), cast(:hashes as bytea[]), cast(:responses as bytea[])
    ) as given(api_key_id, key, request_sha256, response)
    -- Whoever waits for another's keys holds none that the other waits for.
    order by api_key_id, key
    on conflict do nothing
    returning api_key_id, key
    """
)


async def claim_all(
    connection: AsyncConnection, keys: Sequence[Key], *, wait_seconds: float = 0
) -> set[tuple[UUID, str]]:
    """Take those of these keys that are free, as `claim` does; returns the identities of what was taken.

    Args:
        connection: See `claim`.
        keys: Each once.
        wait_seconds: How long the transaction waits for each lock, here and later: for somebody who holds one of the
            keys, for example. 0: as long as a statement may take.

    Raises:
        sqlalchemy.exc.OperationalError: It has waited for so long (`LockNotAvailable`).
    """
    given = {
        "patience": f"{round(wait_seconds * 1000)}ms",
        "clients": [key.api_key_id for key in keys],
        "names": [key.name for key in keys],
        "hashes": [key.request_sha256 for key in keys],
        "responses": [key.response for key in keys],
    }
    return {(row.api_key_id, row.key) for row in await connection.execute(_CLAIM, given)}


async def recall(connection: AsyncConnection, api_key_id: UUID, key: str, *, request_sha256: bytes) -> bytes | None:
    """The first answer to this request; None if the key is free.

    Raises:
        IdempotencyConflict: The key is taken by a request that reads otherwise.
    """
    statement = select(idempotency_keys.c.request_sha256, idempotency_keys.c.response).where(
        idempotency_keys.c.api_key_id == api_key_id, idempotency_keys.c.key == key
    )
    first = (await connection.execute(statement)).one_or_none()
    if first is None:
        return None
    if first.request_sha256 != request_sha256:
        raise IdempotencyConflict("this idempotency key was used for a request with another content")
    return bytes(first.response)


async def forget(connection: AsyncConnection, older_than: timedelta, *, limit: int) -> int:
    """Drop at most `limit` of the keys that nobody repeats any more; return how many."""
    key = tuple_(idempotency_keys.c.api_key_id, idempotency_keys.c.key)
    old = (
        select(idempotency_keys.c.api_key_id, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at < func.now() - older_than)
        .limit(limit)
    )
    return (await connection.execute(delete(idempotency_keys).where(key.in_(old)))).rowcount
