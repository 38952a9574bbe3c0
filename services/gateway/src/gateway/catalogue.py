"""The catalogue: which task types there are, learnt from what workers announce, and what their payloads must look like.

The gateway imports no contract. A service that announces itself is known to every running api process within a second.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.models import MANIFESTS_CHANNEL, manifests
from gateway.payloads import PayloadValidator, UnusableSchema
from gateway.transactions import transaction
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, TypeManifest

logger = logging.getLogger(__name__)

FRESH_SECONDS: Final = 1.0
"""How long a process answers from what it has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """A task type, the service that runs it, and the validator of its payloads."""

    manifest: TypeManifest
    service: str
    announced_at: datetime
    validator: PayloadValidator

    @property
    def type(self) -> str:
        return self.manifest.type

    def view(self) -> dict[str, Any]:
        """The fields of a `TypeView`."""
        fields = self.manifest.model_dump(exclude={"time_limit_seconds"})
        return {**fields, "service": self.service, "announced_at": self.announced_at}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was announced at one moment.

    Attributes:
        version: Differs between snapshots with different content.
        commands: What may be submitted, by type.
        listeners: Handlers of events, by type; an event may have many.
    """

    version: Mapping[str, datetime] = field(default_factory=dict)
    commands: Mapping[str, KnownType] = field(default_factory=dict)
    listeners: Sequence[KnownType] = ()

    def all(self) -> list[KnownType]:
        """Every type, by name and then by service."""
        return sorted([*self.commands.values(), *self.listeners], key=lambda known: (known.type, known.service))

    def find(self, type_name: str) -> KnownType | None:
        """The command of that name, or else the first listener to the event of that name."""
        found = self.commands.get(type_name)
        return found or next((known for known in self.all() if known.type == type_name), None)

    def listener(self, type_name: str, service: str) -> KnownType | None:
        """The service's handler of the event of that name."""
        return next((known for known in self.listeners if (known.type, known.service) == (type_name, service)), None)

    def nearest(self, type_name: str) -> list[str]:
        """Up to three commands whose names read alike, the likeliest first."""
        return difflib.get_close_matches(type_name[:200], self.commands, n=3, cutoff=0.5)


class Catalogue:
    """Reads manifests when what it has is older than a second, once however many requests ask at the same time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._snapshot = Snapshot()
        self._services: dict[str, list[KnownType]] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def current(self, *, max_age_seconds: float = FRESH_SECONDS) -> Snapshot:
        """What is announced now, as of at most `max_age_seconds` ago.

        Raises:
            DatabaseUnavailable: It has to be read and cannot be.
        """
        if time.monotonic() - self._read_at > max_age_seconds:
            asked_at = time.monotonic()
            async with self._reading:
                # Whoever waited for the lock may find that it was read meanwhile.
                if self._read_at < asked_at - max_age_seconds:
                    await self._read()
        return self._snapshot

    async def find_command(self, type_name: str) -> tuple[KnownType | None, Snapshot]:
        """The command of that name, looked up anew before it is called unknown."""
        snapshot = await self.current()
        if type_name not in snapshot.commands:
            snapshot = await self.current(max_age_seconds=0)
        return snapshot.commands.get(type_name), snapshot

    async def find(self, type_name: str, kind: TaskKind, service: str) -> KnownType | None:
        """The command of that name, or the service's handler of the event of that name."""
        if kind is TaskKind.COMMAND:
            known, _ = await self.find_command(type_name)
            return known
        return (await self.current(max_age_seconds=0)).listener(type_name, service)

    async def _read(self) -> None:
        started_at = time.monotonic()
        async with transaction(self._engine) as connection:
            rows = await connection.execute(
                select(manifests.c.service, manifests.c.changed_at, manifests.c.announced_at).order_by("service")
            )
            stamps = {row.service: row.changed_at for row in rows}
            changed = [name for name, changed_at in stamps.items() if self._snapshot.version.get(name) != changed_at]
            if changed:
                statement = select(manifests).where(manifests.c.service.in_(changed))
                for row in await connection.execute(statement):
                    self._services[row.service] = list(_types_of(Manifest.model_validate(row.manifest)))
        if changed or stamps.keys() != self._snapshot.version.keys():
            self._services = {name: known for name, known in self._services.items() if name in stamps}
            self._snapshot = _assemble(self._services, stamps)
            logger.info("catalogue read", extra={"services": sorted(stamps), "changed": changed})
        self._read_at = started_at


def _types_of(manifest: Manifest) -> Iterator[KnownType]:
    for announced in manifest.types:
        try:
            validator = PayloadValidator(announced.payload_schema)
        except UnusableSchema as error:
            # One type of one service must not keep all others from being served.
            logger.error(  # noqa: TRY400 - the reason says it all
                "type left out of the catalogue", extra={"type": announced.type, "reason": str(error)}
            )
            continue
        yield KnownType(
            manifest=announced, service=manifest.service, announced_at=manifest.announced_at, validator=validator
        )


def _assemble(services: Mapping[str, Sequence[KnownType]], version: Mapping[str, datetime]) -> Snapshot:
    commands: dict[str, KnownType] = {}
    listeners: list[KnownType] = []
    for known in sorted(
        (known for types in services.values() for known in types), key=lambda known: known.announced_at
    ):
        if known.manifest.kind is TaskKind.EVENT:
            listeners.append(known)
            continue
        other = commands.get(known.type)
        if other is not None and other.service != known.service:
            logger.error(
                "two services announce one command",
                extra={"type": known.type, "services": sorted((other.service, known.service))},
            )
        commands[known.type] = known
    return Snapshot(version=dict(version), commands=commands, listeners=tuple(listeners))


async def store(connection: AsyncConnection, manifest: Manifest) -> bool:
    """Keep what a service announces, unless something newer is kept; True if the content changed."""
    content = manifest.model_dump(mode="json", exclude={"announced_at"})
    before = await connection.execute(
        select(manifests.c.manifest, manifests.c.announced_at)
        .where(manifests.c.service == manifest.service)
        .with_for_update()
    )
    row = before.one_or_none()
    if row is not None and row.announced_at > manifest.announced_at:
        return False
    changed = row is None or {**row.manifest, "announced_at": None} != {**content, "announced_at": None}
    statement = insert(manifests).values(
        service=manifest.service,
        release=manifest.release,
        manifest=manifest.model_dump(mode="json"),
        announced_at=manifest.announced_at,
        changed_at=func.clock_timestamp(),
    )
    new = statement.excluded
    statement = statement.on_conflict_do_update(
        index_elements=[manifests.c.service],
        set_={
            "release": new.release,
            "manifest": new.manifest,
            "announced_at": new.announced_at,
            **({"changed_at": new.changed_at} if changed else {}),
        },
        where=manifests.c.announced_at <= new.announced_at,
    )
    await connection.execute(statement)
    if changed:
        await connection.execute(
            text("select pg_notify(:channel, :service)"), {"channel": MANIFESTS_CHANNEL, "service": manifest.service}
        )
    return changed
