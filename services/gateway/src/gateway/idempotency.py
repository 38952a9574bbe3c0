"""Idempotency keys: the same request, however often it is sent, is one task and gets one answer.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import idempotency_keys
from taskmesh.errors import ConflictError

MAX_LENGTH = 200


class IdempotencyConflict(ConflictError):
    """The key was used for another request."""

    code = "idempotency_conflict"


def fingerprint(request: BaseModel) -> bytes:
    """SHA-256 of a request in canonical JSON: the order of keys and white space do not matter, all else does."""
    content = [type(request).__name__, request.model_dump(mode="json", exclude_unset=True)]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).digest()


async def claim(
    connection: AsyncConnection, api_key_id: UUID, key: str, *, request_sha256: bytes, response: bytes
) -> bytes | None:
    """Take the key for this request and keep its answer; if it is taken already, return the first answer.

    Must be the first write of the transaction: a second request with the key waits here until the first has committed
    or rolled back, and so writes nothing in either case that must be undone.

    Raises:
        IdempotencyConflict: The key is taken by a request that reads otherwise.
    """
    statement = (
        insert(idempotency_keys)
        .values(api_key_id=api_key_id, key=key, request_sha256=request_sha256, response=response)
        .on_conflict_do_nothing()
        .returning(idempotency_keys.c.key)
    )
    while (await connection.execute(statement)).one_or_none() is None:
        first = await recall(connection, api_key_id, key, request_sha256=request_sha256)
        if first is not None:
            return first
        # It was forgotten between the two statements; it is free again.
    return None


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
