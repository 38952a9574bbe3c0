"""The projector role: what workers and the broker tell about tasks, written into the ledger.

A batch of messages is one transaction, acknowledged after its commit. A message that nobody can read is kept as a dead
letter, so it is neither lost nor tried for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.trace import Link, SpanKind
from pydantic import ValidationError
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import catalogue, dead_letters, idempotency, ledger, lineage, schedules, sightings
from gateway.dead_letters import DeadLetter
from gateway.transactions import transaction
from taskmesh import lifecycle, telemetry
from taskmesh.consuming import Delivery
from taskmesh.contracts.control import Sightings
from taskmesh.contracts.lifecycle import LifecycleEvent
from taskmesh.contracts.manifest import Manifest
from taskmesh.errors import DatabaseUnavailable
from taskmesh.sightings import ROUTING_KEY as SIGHTINGS_KEY
from taskmesh.topology import DEAD_QUEUE, LIFECYCLE_QUEUE

logger = logging.getLogger(__name__)

MANIFEST_KEY: Final = "manifest."
MAX_LINKS: Final = 128
"""What OpenTelemetry's SDK keeps of a span's links."""
HOUSEKEEPING_SECONDS: Final = 600.0
FORGOTTEN_AT_ONCE: Final = 10_000
"""Keys deleted in one transaction: a long backlog must not run into the statement's time limit and stay for good."""


@dataclass(slots=True)
class _Batch:
    """What a batch of deliveries says, sorted by what is to be done about it."""

    events: list[LifecycleEvent] = field(default_factory=list)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    letters: list[DeadLetter] = field(default_factory=list)
    sightings: list[Sightings] = field(default_factory=list)


class Projector:
    """Writes batches into the ledger."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def handle(self, deliveries: Sequence[Delivery]) -> None:
        """Commit what the deliveries say; they may be acknowledged when this returns.

        Raises:
            DatabaseUnavailable: Nothing is committed, and everything may be handled again.
        """
        batch = _read(deliveries)
        with _span(deliveries, batch):
            try:
                await self._commit(batch)
            except DataError:
                if len(deliveries) > 1:
                    # One of them holds what PostgreSQL cannot keep (a NUL character, say): find it.
                    for delivery in deliveries:
                        await self.handle([delivery])
                    return
                logger.exception("message cannot be kept", extra={"queue": deliveries[0].queue})
                await self._commit(_Batch(letters=[dead_letters.malformed(deliveries[0])]))

    async def _commit(self, batch: _Batch) -> None:
        now = datetime.now(UTC)
        failures = [failure for letter in batch.letters if (failure := letter.failure(now)) is not None]
        async with transaction(self._engine) as connection:
            events = await lineage.with_children(connection, batch.events)
            accepted = await ledger.advance(connection, [*events, *failures])
            await dead_letters.store(connection, batch.letters)
            for manifest in batch.manifests.values():
                await _announce(connection, manifest)
            # After the events that were told before them.
            await sightings.store(connection, batch.sightings)
        for letter in batch.letters:
            logger.error(
                "dead letter stored",
                extra={"task_id": str(letter.task_id), "queue": letter.queue, "reason": letter.reason},
            )
        logger.debug("batch projected", extra={"events": len(batch.events), "accepted": accepted})


async def _announce(connection: AsyncConnection, manifest: Manifest) -> None:
    if await catalogue.store(connection, manifest):
        logger.info(
            "manifest stored",
            extra={"announcer": manifest.service, "release": manifest.release, "types": len(manifest.types)},
        )
        await schedules.sync_announced(connection, manifest)


def _read(deliveries: Sequence[Delivery]) -> _Batch:
    batch = _Batch()
    for delivery in deliveries:
        if delivery.queue == DEAD_QUEUE:
            batch.letters.append(dead_letters.from_broker(delivery))
            continue
        try:
            if delivery.routing_key.startswith(MANIFEST_KEY):
                manifest = Manifest.model_validate_json(delivery.body)
                newest = batch.manifests.get(manifest.service)
                if newest is None or newest.announced_at <= manifest.announced_at:
                    batch.manifests[manifest.service] = manifest
            elif delivery.routing_key.startswith(SIGHTINGS_KEY):
                batch.sightings.append(Sightings.model_validate_json(delivery.body))
            else:
                batch.events += lifecycle.decode(delivery.body)
        except ValidationError as error:
            logger.error(  # noqa: TRY400 - the error quotes the message
                "message cannot be read", extra={"routing_key": delivery.routing_key, "faults": error.error_count()}
            )
            batch.letters.append(dead_letters.malformed(delivery))
    return batch


def _span(deliveries: Sequence[Delivery], batch: _Batch) -> contextlib.AbstractContextManager[Any]:
    """One span for the batch, with a link to the trace of each task: a span has one parent, and these are many."""
    traceparents = {event.traceparent for event in batch.events if event.traceparent}
    contexts = [
        trace.get_current_span(telemetry.extract({"traceparent": traceparent})).get_span_context()
        for traceparent in sorted(traceparents)[:MAX_LINKS]
    ]
    return telemetry.tracer().start_as_current_span(
        f"process {deliveries[0].queue}",
        kind=SpanKind.CONSUMER,
        links=[Link(context) for context in contexts if context.is_valid],
        attributes={
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": deliveries[0].queue,
            "messaging.batch.message_count": len(deliveries),
        },
    )


async def keep_house(engine: AsyncEngine, stop: asyncio.Event, *, forget_keys_after: timedelta) -> None:
    """Drop idempotency keys that are too old to be repeated, now and then until `stop` is set."""
    while not stop.is_set():
        try:
            async with transaction(engine) as connection:
                forgotten = await idempotency.forget(connection, forget_keys_after, limit=FORGOTTEN_AT_ONCE)
        except DatabaseUnavailable:
            logger.warning("housekeeping put off")
        else:
            if forgotten:
                logger.info("idempotency keys forgotten", extra={"count": forgotten})
            if forgotten == FORGOTTEN_AT_ONCE:
                continue
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), HOUSEKEEPING_SECONDS)


QUEUES: Final = (LIFECYCLE_QUEUE, DEAD_QUEUE)
"""What the role consumes."""
