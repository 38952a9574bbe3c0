"""The projector role: what workers and the broker tell about tasks, written into the ledger.

A batch of messages is one transaction, acknowledged after its commit. A message that nobody can read, or that
PostgreSQL cannot keep, is kept as a dead letter, so it is neither lost nor tried for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from pydantic import ValidationError
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import catalogue, idempotency, ledger, lineage, measuring, run_times, schedules, sightings
from gateway.catalogue import Catalogue
from gateway.dead_letters import diagnosing, letter, store
from gateway.dead_letters.letter import DeadLetter
from gateway.progress import Step
from gateway.run_times import RunTimes
from gateway.transactions import transaction
from taskmesh import celery_protocol, lifecycle, logs, telemetry, traces
from taskmesh.consuming import Delivery
from taskmesh.contracts.control import Sightings
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure
from taskmesh.contracts.manifest import Manifest
from taskmesh.errors import DatabaseUnavailable
from taskmesh.sightings import ROUTING_KEY as SIGHTINGS_KEY
from taskmesh.topology import DEAD_QUEUE, LIFECYCLE_QUEUE

logger = logging.getLogger(__name__)

MANIFEST_KEY: Final = "manifest."
HOUSEKEEPING_SECONDS: Final = 600.0
RUN_TIMES_SECONDS: Final = 5.0
"""How often the means of run times are written."""
FORGOTTEN_AT_ONCE: Final = 10_000
"""Keys deleted in one transaction: a long backlog must not run into the statement's time limit and stay for good."""
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Of a message of ours that is read: the relays send parcels of a quarter of a megabyte."""
MAX_TASKS_TOLD: Final = 50_000
"""In one message, children included."""
TASKS_AT_ONCE: Final = 2_000
"""Tasks in one transaction, which must end within the statements' time limit."""
MAX_NAME: Final = 200
"""Of a type or a service; what is longer does not fit into an index."""

LIMIT_EXCEEDED: Final = "54"
"""SQLSTATEs of what is too large or too deep for PostgreSQL."""


class _Unkeepable(Exception):
    """PostgreSQL refuses something that a message says; the text is the error's class."""


class _Unreadable(ValueError):
    """A message of our own queue is not what it should be; the text says why, and quotes nothing."""


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
        self._catalogue = Catalogue(engine)
        self._run_times = RunTimes()

    async def keep_run_times(self, stop: asyncio.Event) -> None:
        """Write the means of run times, now and then until `stop` is set."""
        while not stop.is_set():
            heard = self._run_times.take()
            if heard:
                # What could not be written is missed by nobody: the next runs take about as long.
                with contextlib.suppress(DatabaseUnavailable):
                    async with transaction(self._engine) as connection:
                        await run_times.store(connection, heard)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RUN_TIMES_SECONDS)

    async def handle(self, deliveries: Sequence[Delivery]) -> None:
        """Commit what the deliveries say; they may be acknowledged when this returns.

        Raises:
            DatabaseUnavailable: Nothing is committed, or not everything is, and everything may be handled again.
        """
        batch = _read(deliveries)
        with _span(deliveries, batch):
            try:
                await self._commit(batch)
            except _Unkeepable:
                # One of them holds what PostgreSQL cannot keep (a NUL character, say): find it.
                for delivery in deliveries:
                    await self._commit_alone(delivery)

    async def _commit_alone(self, delivery: Delivery) -> None:
        """Commit what one delivery says, event by event if need be; what cannot be kept becomes a dead letter."""
        batch = _read([delivery])
        try:
            await self._commit(batch)
        except _Unkeepable as error:
            fault = f"PostgreSQL cannot keep it: {error}"
            logger.error(  # noqa: TRY400 - the error may quote the message
                "message cannot be kept", extra={"queue": delivery.queue, "exception": str(error)}
            )
            if batch.events:
                for event in batch.events:
                    await self._commit_event(event, delivery)
            else:
                await self._commit(_Batch(letters=[letter.malformed(delivery, fault)]))

    async def _commit_event(self, event: LifecycleEvent, delivery: Delivery) -> None:
        """Commit one event; one that cannot be kept is parked, and of its task at least the state is told."""
        try:
            await self._commit(_Batch(events=[event]))
        except _Unkeepable as error:
            fault = f"PostgreSQL cannot keep this event: {error}"
            parked = letter.malformed(delivery, fault, body=lifecycle.encode([event]))
            try:
                await self._commit(_Batch(events=[_bare(event)], letters=[parked]))
            except _Unkeepable:
                await self._commit(_Batch(letters=[parked]))

    async def _commit(self, batch: _Batch) -> None:
        """Commit a batch, or the first parts of a large one: what is told again is no news."""
        told = list(batch.events)
        while len(told) > TASKS_AT_ONCE:
            await self._write(_Batch(events=told[:TASKS_AT_ONCE]))
            del told[:TASKS_AT_ONCE]
        # What a service has seen comes after the events that it told before.
        await self._write(replace(batch, events=told))

    async def _write(self, batch: _Batch) -> None:
        """Commit a batch in one transaction.

        Raises:
            _Unkeepable: Something in it is the cause that nothing of it was committed.
        """
        now = datetime.now(UTC)
        announced = await self._catalogue.current() if batch.letters else catalogue.Snapshot()
        async with _blaming(), transaction(self._engine) as connection:
            diagnoses = await diagnosing.diagnose(connection, batch.letters, announced) if batch.letters else []
            events = await lineage.with_children(connection, batch.events)
            steps = await ledger.advance(connection, [*events, *_failures(batch.letters, diagnoses, now)])
            kept = await store.store(connection, batch.letters, diagnoses)
            await store.complete(connection, events)
            for manifest in batch.manifests.values():
                await _announce(connection, manifest)
            await sightings.store(connection, batch.sightings)
        self._measure(steps)
        measuring.count_letters(kept)
        for stored, diagnosis in zip(batch.letters, diagnoses, strict=True):
            logger.error(
                "dead letter stored",
                extra={
                    **_task_of(stored, diagnosis),
                    "queue": stored.queue,
                    "reason": stored.reason,
                    "code": diagnosis.code,
                },
            )
        logger.debug("batch projected", extra={"events": len(batch.events), "accepted": len(steps)})

    def _measure(self, steps: Sequence[Step]) -> None:
        measuring.count_steps(steps)
        measuring.time_lag(steps)
        for step in steps:
            if (seconds := step.run_seconds) is not None:
                self._run_times.add(step.service, step.type, max(0.0, seconds))


def _task_of(dead: DeadLetter, diagnosis: letter.Diagnosis) -> dict[str, Any]:
    """The facts of a log line about a dead letter's task, as far as the message and the ledger tell."""
    known = celery_protocol.log_facts(dead.headers)
    attempt = diagnosis.attempt or known.get("attempt")
    return logs.of_task(dead.task_id, known.get("type"), attempt, trace_id=dead.trace_id)


@contextlib.asynccontextmanager
async def _blaming() -> AsyncIterator[None]:
    """Tell what a message is the cause of from what is wrong with the database, its schema or this program."""
    try:
        yield
    except (DataError, IntegrityError, UnicodeError, OverflowError) as error:
        raise _Unkeepable(type(error).__name__) from error
    except DBAPIError as error:
        sqlstate: str | None = getattr(error.orig, "sqlstate", None)
        if sqlstate is None or not sqlstate.startswith(LIMIT_EXCEEDED):
            raise
        raise _Unkeepable(type(error.orig).__name__) from error


def _failures(
    letters: Iterable[DeadLetter], diagnoses: Iterable[letter.Diagnosis], now: datetime
) -> list[LifecycleEvent]:
    pairs = zip(letters, diagnoses, strict=True)
    return [failure for dead, diagnosis in pairs if (failure := dead.failure(diagnosis, now)) is not None]


def _bare(event: LifecycleEvent) -> LifecycleEvent:
    """The event without what it carries: which task is in which state."""
    kept = ("task_id", "type", "state", "at", "service", "kind", "root_id", "parent_id", "event_id")
    sequence = min(max(event.sequence, 0), celery_protocol.MAX_SEQUENCE)
    lost = TaskFailure(
        code="malformed", message="what its worker has told is kept as a dead letter of gateway.lifecycle"
    )
    return LifecycleEvent(
        **{name: getattr(event, name) for name in kept},
        sequence=sequence,
        attempt=0,
        failure=lost if event.failure else None,
    )


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
            batch.letters.append(letter.from_broker(delivery))
            continue
        try:
            _read_one(delivery, batch)
        except (_Unreadable, ValidationError) as error:
            fault = str(error) if isinstance(error, _Unreadable) else _fault(error)
            logger.error(  # noqa: TRY400 - the error quotes the message
                "message cannot be read", extra={"routing_key": str(delivery.routing_key), "reason": fault}
            )
            batch.letters.append(letter.malformed(delivery, fault))
    return batch


def _read_one(delivery: Delivery, batch: _Batch) -> None:
    """Sort a message of our own queue into the batch.

    Raises:
        _Unreadable, ValidationError: It is none of ours.
    """
    if len(delivery.body) > MAX_MESSAGE_BYTES:
        raise _Unreadable(f"the message has more than {MAX_MESSAGE_BYTES} bytes")
    # What is no UTF-8 comes as bytes.
    key = str(delivery.routing_key)
    if key.startswith(MANIFEST_KEY):
        manifest = Manifest.model_validate_json(delivery.body)
        newest = batch.manifests.get(manifest.service)
        if newest is None or newest.announced_at <= manifest.announced_at:
            batch.manifests[manifest.service] = manifest
    elif key.startswith(SIGHTINGS_KEY):
        batch.sightings.append(Sightings.model_validate_json(delivery.body))
    else:
        events = lifecycle.decode(delivery.body)
        _check(events)
        # A large family is told in parts, the children first: whoever is finished has all of them.
        batch.events += _apart(events) if _count(events) > TASKS_AT_ONCE else events


def _check(events: Sequence[LifecycleEvent]) -> None:
    if _count(events) > MAX_TASKS_TOLD:
        raise _Unreadable(f"the message tells of more than {MAX_TASKS_TOLD} tasks")
    for event in lineage.flat(events):
        if len(event.type) > MAX_NAME or len(event.service) > MAX_NAME:
            raise _Unreadable(f"a type or a service has more than {MAX_NAME} characters")


def _count(events: Sequence[LifecycleEvent]) -> int:
    return sum(1 for _ in islice(lineage.flat(events), MAX_TASKS_TOLD + 1))


def _apart(events: Sequence[LifecycleEvent]) -> list[LifecycleEvent]:
    return [event.model_copy(update={"children": ()}) for event in lineage.flat(events)]


def _fault(error: ValidationError) -> str:
    """Where the message is wrong; its own words quote nothing, and its values are left out."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    places = [f"/{'/'.join(str(part) for part in fault['loc'])[:100]} {fault['type']}" for fault in faults[:5]]
    return "; ".join(places)


def _span(deliveries: Sequence[Delivery], batch: _Batch) -> contextlib.AbstractContextManager[Any]:
    """One span for the batch, with a link to the trace of each task: a span has one parent, and these are many."""
    traceparents = {event.traceparent for event in batch.events if event.traceparent}
    return telemetry.tracer().start_as_current_span(
        f"process {deliveries[0].queue}",
        Context(),
        kind=SpanKind.CONSUMER,
        links=traces.members(traceparents),
        attributes={
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": deliveries[0].queue,
            "messaging.batch.message_count": len(deliveries),
        },
    )


async def keep_house(
    engine: AsyncEngine, stop: asyncio.Event, *, forget_keys_after: timedelta, forget_letters_after: timedelta
) -> None:
    """Drop what is too old to be of use, now and then until `stop` is set: idempotency keys, resolved dead letters."""
    while not stop.is_set():
        try:
            async with transaction(engine) as connection:
                keys = await idempotency.forget(connection, forget_keys_after, limit=FORGOTTEN_AT_ONCE)
            async with transaction(engine) as connection:
                letters = await store.forget_resolved(connection, forget_letters_after, limit=FORGOTTEN_AT_ONCE)
        except DatabaseUnavailable:
            logger.warning("housekeeping put off")
        else:
            if keys:
                logger.info("idempotency keys forgotten", extra={"count": keys})
            if letters:
                logger.info("resolved dead letters forgotten", extra={"count": letters})
            if FORGOTTEN_AT_ONCE in (keys, letters):
                continue
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), HOUSEKEEPING_SECONDS)


QUEUES: Final = (LIFECYCLE_QUEUE, DEAD_QUEUE)
"""What the role consumes."""
