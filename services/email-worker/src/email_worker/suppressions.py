"""Addresses that are not mailed any more.

Only a hash of each address is kept, so that the list can outlive the erasure of a person's messages.
"""

from __future__ import annotations

import hashlib
from uuid import UUID

from sqlalchemy import Column, DateTime, LargeBinary, Table, Text, Uuid, exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from email_worker.messages import metadata

suppressions = Table(
    "suppressions",
    metadata,
    Column("address_sha256", LargeBinary, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("message_id", Uuid, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)


def suppress(session: Session, address: str, *, reason: str, message_id: UUID) -> None:
    """Stop mailing the address; the first reason stays."""
    session.execute(
        insert(suppressions)
        .values(address_sha256=_hash(address), reason=reason, message_id=message_id)
        .on_conflict_do_nothing()
    )


def is_suppressed(session: Session, address: str) -> bool:
    """True if the address must not be mailed."""
    statement = select(exists().where(suppressions.c.address_sha256 == _hash(address)))
    return bool(session.execute(statement).scalar_one())


def _hash(address: str) -> bytes:
    # Local parts are case-sensitive on paper only; whoever bounces as Anna@ bounces as anna@.
    return hashlib.sha256(address.strip().lower().encode()).digest()
