"""The relay: moves due rows of the outbox to the broker.

    claim due rows FOR UPDATE SKIP LOCKED -> publish with confirms -> delete what was confirmed -> COMMIT

All in one transaction, the only one in the mesh that waits for the network: it holds its row locks while it publishes,
bounded by batch size and confirm timeout, so that any number of relays share a table and a killed one frees its rows
at once. Killed between publish and commit, it publishes again: at least once, and the inbox makes it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

import psycopg
from pydantic import SecretStr
from sqlalchemy import BigInteger, any_, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskmesh import amqp, celery_protocol, exchanges, lifecycle, logs
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState
from taskmesh.contracts.manifest import Manifest
from taskmesh.database import is_unavailable, reason_of
from taskmesh.errors import BrokerUnavailable, TransientError
from taskmesh.health import Health
from taskmesh.inbox import InboxState, inbox
from taskmesh.listening import ListeningConnection
from taskmesh.metrics import catalogue, instruments
from taskmesh.outbox import NOTIFY_CHANNEL, insert_messages, outbox
from taskmesh.outbox_watch import Watch
from taskmesh.publish_spans import PublishSpans
from taskmesh.publishing import Outcome, OutgoingMessage, Publisher, Report

logger = logging.getLogger(__name__)

BATCH_SIZE = 500
POLL_SECONDS = 1.0
ANNOUNCE_SECONDS = 30.0

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
"""How long a message that was returned or refused waits: 1, 2, 4 ... s. At most so long after its queue appears."""

MEASURE_SECONDS = 5.0
"""How often the outbox is looked at for the metrics."""

PARCEL_MAX_ROWS = 200
PARCEL_MAX_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """A claimed row of the outbox."""

    id: int
    due_at: datetime
    exchange: str
    routing_key: str
    mandatory: bool
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: bytes = field(repr=False)
    task_id: UUID | None
    expires_at: datetime | None
    created_at: datetime
    failures: int

    @property
    def was_delayed(self) -> bool:
        """True if it was given a time of its own, also one that had passed before its transaction began."""
        return self.due_at != self.created_at


AfterCommit = Callable[[], None]


class RelayHooks(Protocol):
    """What a service writes about its messages, in the relay's transaction.

    A hook may return what is to be called when the transaction has been committed.

    A hook that raises is rolled back and logged, and the relay goes on: one row that a hook cannot bear must not have
    all others published again and again. Only when the database is unavailable is everything rolled back.
    """

    async def published(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> AfterCommit | None:
        """Is told of rows that the broker has confirmed; they are deleted next."""

    async def expired(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> AfterCommit | None:
        """Is told of rows whose `expires_at` has passed, so that they were not published; they are deleted next."""


class ServiceHooks:
    """Tells the ledger, and the inbox, of a worker service's delayed tasks: `queued` when they leave, or `expired`.

    A task that was due at once was reported when it was written; an event is no task until a listener takes it.
    """

    def __init__(self, service: str) -> None:
        self._service = service

    async def published(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> None:
        await self._report(connection, [row for row in rows if row.was_delayed], TaskState.QUEUED)

    async def expired(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> None:
        await self._report(connection, rows, TaskState.EXPIRED)
        # A retry of our own was the task's last hope.
        own = [row.task_id for row in rows if row.exchange == exchanges.DIRECT]
        if own:
            await connection.execute(
                update(inbox)
                .where(inbox.c.task_id.in_(own), inbox.c.state == InboxState.WAITING.value)
                .values(state=InboxState.EXPIRED.value, updated_at=func.now())
            )

    async def _report(self, connection: AsyncConnection, rows: Sequence[OutboxRow], state: TaskState) -> None:
        events = [event for row in rows if (event := self._event(row, state)) is not None]
        if events:
            await connection.execute(insert_messages([lifecycle.message(event) for event in events]))

    def _event(self, row: OutboxRow, state: TaskState) -> LifecycleEvent | None:
        if row.exchange not in {exchanges.COMMANDS, exchanges.DIRECT}:
            return None
        try:
            task = celery_protocol.read(row.headers, ([], {}, None))
        except celery_protocol.MalformedMessage:
            logger.warning(
                "row carries no task", extra={"outbox_id": row.id, "exchange": row.exchange, **_tasks_of([row])}
            )
            return None
        # A listener's retry carries its own id already, and the event's in a header.
        event_id = row.headers.get(celery_protocol.EVENT_ID_HEADER)
        return LifecycleEvent(
            task_id=task.id,
            event_id=UUID(event_id) if event_id else None,
            type=task.type,
            state=state,
            at=datetime.now(UTC),
            service=self._service,
            kind=task.kind,
            sequence=task.sequence,
            attempt=task.retries + 1,
            root_id=task.root_id,
            parent_id=task.parent_id,
            traceparent=task.traceparent,
            due_at=row.due_at,
            expires_at=row.expires_at,
        )


Companion = Callable[[asyncio.Event], Coroutine[Any, Any, None]]


class Relay:
    """Publishes the outbox of one service until it is told to stop, through outages of database and broker.

    Args:
        engine: Of the service's database; the relay uses one connection of it and opens another one to listen on.
        service: Names the connections.
        hooks: None for a service that wants nothing written.
        announce: Makes the service's manifest, which is then announced at the start and every `announce_seconds`.
        companions: What else is to run for as long as the relay does, until the event is set. One that fails ends the
            relay, to be started again.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        amqp_url: SecretStr | str,
        service: str,
        health: Health | None = None,
        hooks: RelayHooks | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        poll_seconds: float = POLL_SECONDS,
        announce: Callable[[], Manifest] | None = None,
        announce_seconds: float = ANNOUNCE_SECONDS,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._engine = engine
        self._service = service
        self._health = health or Health(None, f"{service}-relay")
        self._hooks = hooks
        self._batch_size = batch_size
        self._poll_seconds = poll_seconds
        self._announce = announce
        self._announce_seconds = announce_seconds
        self._companions = companions
        self._publisher = Publisher(amqp_url, name=f"{service}-relay")
        self._spans = PublishSpans(amqp_url)
        self._woken = asyncio.Event()
        self._watch = Watch(engine)
        # How many rows to claim. Smaller after a connection was lost in the middle of a batch: should one message be
        # the cause, it is alone in the end, and steps aside.
        self._claim_size = batch_size

    async def run(self, stop: asyncio.Event) -> None:
        """Move rows until `stop` is set; the batch in hand is finished first."""
        try:
            # A companion that dies takes the relay with it, to be started again: it would be missed too late.
            async with asyncio.TaskGroup() as group:
                companions = [group.create_task(self._wake_on(stop)), group.create_task(self._listen())]
                if instruments.is_on():
                    companions.append(group.create_task(self._keep_measuring()))
                if self._announce is not None:
                    companions.append(group.create_task(self._keep_announcing(self._announce)))
                companions += [group.create_task(companion(stop)) for companion in self._companions]
                await self._run(stop)
                for companion in companions:
                    companion.cancel()
        finally:
            await self._publisher.close()
            self._health.stopped()

    async def _run(self, stop: asyncio.Event) -> None:
        backoff = amqp.Backoff()
        outage = ready = False
        while not stop.is_set():
            self._health.beat()
            self._woken.clear()
            try:
                await self._publisher.connected()
                was_kept = self._watch.is_kept
                look = await self._move()
                await self._watch.note(rows=look.rows)
            except Exception as error:
                if not outage:
                    expected = isinstance(error, TransientError) or is_unavailable(error)
                    logger.warning("relay interrupted", exc_info=not expected, extra={"reason": _describe(error)})
                    outage = True
                # The wait is the point here, so notifications do not cut it short.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), backoff.next())
                continue
            if outage:
                logger.info("relay works again")
                outage = False
            if not ready:
                self._health.ready()
                ready = True
            backoff.reset()
            if not look.is_full:
                await self._wait(look, stop, is_watching=was_kept or self._watch.is_kept)

    async def _wait(self, look: _Look, stop: asyncio.Event, *, is_watching: bool) -> None:
        """Let rows gather after a batch; without one, wait until somebody says that there is something to do.

        Args:
            look: At the outbox, the last one.
            stop: Ends the wait.
            is_watching: Whether the watch was kept when the look began, or is kept now: then another look is due,
                because somebody may have written a row after that look and told nobody.
        """
        wait_seconds = look.wait_seconds
        if look.rows or is_watching:
            pause_seconds = self._watch.pause_seconds
            wait_seconds -= pause_seconds
            # Notifications do not cut it short.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_seconds)
        if wait_seconds > 0 and not is_watching and not self._woken.is_set():
            self._watch.rest()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait_seconds)

    async def _move(self) -> _Look:
        """Move one batch."""
        published: list[_Published] = []
        is_written = False
        try:
            async with self._engine.begin() as connection:
                claimed = await self._claim(connection)
                expired = [row for row, is_expired in claimed if is_expired]
                due = [row for row, is_expired in claimed if not is_expired]
                fates = await self._publish(due, published)
                after_commit = await self._settle(connection, expired, fates)
                full = len(claimed) == self._claim_size
                wait_seconds = 0.0 if full else await self._seconds_to_next(connection)
                is_written = True
        finally:
            # What is rolled back is published again, and a message has one span. Of a commit whose answer was lost
            # nobody knows: a span too many is better than a trace without its root.
            if is_written:
                for each in published:
                    self._spans.record(each.rows, each.report, claimed_ns=each.claimed_ns)
        for act in after_commit:
            act()
        if fates.unknown and self._claim_size > 1:
            self._claim_size = max(1, self._claim_size // 2)
            raise BrokerUnavailable(fates.unknown_reason)
        if not fates.unknown:
            self._claim_size = min(self._batch_size, self._claim_size * 2)
        return _Look(rows=len(claimed), is_full=full, wait_seconds=wait_seconds)

    async def _claim(self, connection: AsyncConnection) -> list[tuple[OutboxRow, bool]]:
        """Lock the rows that have been due longest; the flag says whether a row has expired."""
        statement = (
            select(*_COLUMNS, (outbox.c.expires_at <= func.now()).label("is_expired"))
            .where(outbox.c.due_at <= func.now())
            .order_by(outbox.c.due_at, outbox.c.id)
            .limit(self._claim_size)
            .with_for_update(skip_locked=True)
        )
        rows = (await connection.execute(statement)).mappings()
        return [(OutboxRow(**{name: row[name] for name in _NAMES}), bool(row["is_expired"])) for row in rows]

    async def _publish(self, rows: Sequence[OutboxRow], published: list[_Published]) -> _Fates:
        claimed_ns = time.time_ns()
        parcels = pack(rows, now_ns=claimed_ns)
        reports = await self._publisher.publish([parcel.message for parcel in parcels]) if parcels else []
        fates = _Fates()
        for parcel, report in zip(parcels, reports, strict=True):
            published.append(_Published(parcel.rows, report, claimed_ns))
            _measure(parcel, report)
            fates.add(parcel.rows, report)
        return fates

    async def _settle(
        self, connection: AsyncConnection, expired: Sequence[OutboxRow], fates: _Fates
    ) -> list[AfterCommit]:
        """Write down what became of the rows; returns what is to be called after the commit."""
        after_commit: list[AfterCommit] = []
        if fates.unknown and self._claim_size == 1:
            # Alone, and the connection was lost again: the next rows get their chance.
            fates.put_back[fates.unknown_reason] += fates.unknown
        gone = list(fates.confirmed)
        if self._hooks is not None and fates.confirmed:
            # What is published is published, whatever becomes of the hook.
            await _guarded(connection, self._hooks.published, fates.confirmed, after_commit)
        if expired:
            if self._hooks is None or await _guarded(connection, self._hooks.expired, expired, after_commit):
                gone += expired
            else:
                fates.put_back["its expiry could not be written down"] += expired
        if gone:
            await connection.execute(delete(outbox).where(_is_one_of(gone)))
        for reason, rows in fates.put_back.items():
            logger.warning(
                "messages put back",
                extra={"count": len(rows), "reason": reason, "routing_key": rows[0].routing_key, **_tasks_of(rows)},
            )
            await connection.execute(_put_back(rows, reason))
        return after_commit

    async def _keep_measuring(self) -> None:
        """Show how long the oldest row has been due, whatever the relay itself waits for at the moment."""
        while True:
            try:
                async with self._engine.connect() as connection:
                    lag: timedelta | None = (await connection.execute(_LAG)).scalar_one()
                catalogue.OUTBOX_LAG.show([(lag.total_seconds() if lag is not None else 0.0, {})])
            except (SQLAlchemyError, OSError):
                # Nobody can see the outbox; the relay itself says so.
                catalogue.OUTBOX_LAG.hide()
            await asyncio.sleep(MEASURE_SECONDS)

    async def _seconds_to_next(self, connection: AsyncConnection) -> float:
        # Strictly later than this transaction's now(): rows that are due and locked belong to another relay.
        statement = select(func.min(outbox.c.due_at) - func.clock_timestamp()).where(outbox.c.due_at > func.now())
        left: timedelta | None = (await connection.execute(statement)).scalar_one()
        if left is None:
            return self._poll_seconds
        return min(max(left.total_seconds(), 0.0), self._poll_seconds)

    async def _wake_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._woken.set()

    async def _listen(self) -> None:
        """Wake the relay when rows are written; without this it polls, so failures are only slow."""
        url = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        backoff = amqp.Backoff(first_seconds=0.5)
        while True:
            with contextlib.suppress(psycopg.Error, OSError):
                name = f"{self._service}-relay-listener"
                async with await ListeningConnection.connect(
                    url, autocommit=True, connect_timeout=5, application_name=name
                ) as connection:
                    await connection.execute(f"listen {NOTIFY_CHANNEL}")
                    backoff.reset()
                    self._woken.set()
                    async for _ in connection.notifies():
                        self._woken.set()
            await asyncio.sleep(backoff.next())

    async def _keep_announcing(self, make: Callable[[], Manifest]) -> None:
        while True:
            [report] = await self._publisher.publish([announcement(make())])
            if report.outcome is not Outcome.CONFIRMED:
                logger.info("manifest not announced", extra={"outcome": report.outcome, "reason": report.reason})
            # Soon again when nobody took it: the gateway may be set up any moment.
            heard = report.outcome is Outcome.CONFIRMED
            await asyncio.sleep(self._announce_seconds if heard else min(2.0, self._announce_seconds))


def announcement(manifest: Manifest) -> OutgoingMessage:
    """Return the message that announces a manifest. The newest replaces the one before, so none needs an outbox."""
    return OutgoingMessage(
        exchange=exchanges.LIFECYCLE,
        routing_key=f"manifest.{manifest.service}",
        body=manifest.model_dump_json().encode(),
        properties={"content_type": "application/json", "content_encoding": "utf-8", "type": "manifest"},
    )


async def announce_once(amqp_url: SecretStr | str, manifest: Manifest) -> Report:
    """Announce a manifest now, and return what became of it: `returned` when the gateway is not set up yet.

    Raises:
        BrokerUnavailable: The broker cannot be reached, or did not confirm.
    """
    async with Publisher(amqp_url, name=f"{manifest.service}-setup") as publisher:
        await publisher.connected()
        [report] = await publisher.publish([announcement(manifest)])
    if report.outcome is Outcome.UNKNOWN:
        raise BrokerUnavailable(report.reason or "the broker did not confirm")
    return report


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows that travel in one message: one, or many lifecycle rows."""

    rows: Sequence[OutboxRow]
    message: OutgoingMessage


def pack(rows: Sequence[OutboxRow], *, now_ns: int) -> list[Parcel]:
    """Join lifecycle rows of one routing key into messages, and make one message of every other row.

    Publishing is the dearest part of a small task, and each task has several lifecycle events. Their bodies are JSON
    arrays, so joining them takes no parsing.

    Args:
        rows: What is due.
        now_ns: When it leaves, in nanoseconds of Unix time; messages of tasks are told, so that workers can say how
            long each has waited where.
    """
    parcels: list[Parcel] = []
    growing: dict[tuple[str, bool], list[OutboxRow]] = defaultdict(list)
    sizes: dict[tuple[str, bool], int] = defaultdict(int)
    for row in rows:
        if not _can_be_joined(row):
            parcels.append(_alone(row, now_ns))
            continue
        key = (row.routing_key, row.mandatory)
        full = len(growing[key]) == PARCEL_MAX_ROWS or sizes[key] + len(row.body) > PARCEL_MAX_BYTES
        if growing[key] and full:
            parcels.append(_joined(growing.pop(key)))
            sizes.pop(key)
        growing[key].append(row)
        sizes[key] += len(row.body)
    parcels += [_joined(group) for group in growing.values()]
    return parcels


def _can_be_joined(row: OutboxRow) -> bool:
    return (
        row.exchange == exchanges.LIFECYCLE
        and row.routing_key.startswith("task.")
        and row.body.startswith(b"[{")
        and row.body.endswith(b"}]")
    )


def _joined(rows: Sequence[OutboxRow]) -> Parcel:
    # Each row's own trace is named in its report.
    return _parcel(rows, b"[" + b",".join(row.body[1:-1] for row in rows) + b"]", headers={})


def _alone(row: OutboxRow, now_ns: int) -> Parcel:
    if row.task_id is None:
        return _parcel([row], row.body, headers=row.headers)
    headers = {name: value for name, value in row.headers.items() if name != celery_protocol.TRACE_LINKS_HEADER}
    headers[celery_protocol.DUE_HEADER] = round(row.due_at.timestamp() * 1e6)
    headers[celery_protocol.PUBLISHED_HEADER] = now_ns // 1000
    return _parcel([row], row.body, headers=headers)


def _parcel(rows: Sequence[OutboxRow], body: bytes, *, headers: Mapping[str, Any]) -> Parcel:
    first = rows[0]
    message = OutgoingMessage(
        exchange=first.exchange,
        routing_key=first.routing_key,
        body=body,
        headers=headers,
        properties=first.properties,
        mandatory=first.mandatory,
    )
    return Parcel(rows, message)


@dataclass(frozen=True, slots=True)
class _Published:
    """Rows that were offered to the broker in one message, its answer, and when they were claimed."""

    rows: Sequence[OutboxRow]
    report: Report
    claimed_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What a look at the outbox has found: rows that were due, whether there are more, and when the next is due."""

    rows: int
    is_full: bool
    wait_seconds: float


class _Fates:
    """What became of the claimed rows, sorted by what has to be written."""

    def __init__(self) -> None:
        self.confirmed: list[OutboxRow] = []
        self.put_back: dict[str, list[OutboxRow]] = defaultdict(list)
        self.unknown: list[OutboxRow] = []
        self.unknown_reason = ""

    def add(self, rows: Sequence[OutboxRow], report: Report) -> None:
        match report.outcome:
            case Outcome.CONFIRMED:
                self.confirmed += rows
            case Outcome.RETURNED | Outcome.REFUSED:
                self.put_back[report.reason or report.outcome] += rows
            case Outcome.UNKNOWN:
                self.unknown += rows
                self.unknown_reason = report.reason or report.outcome


_NAMES = tuple(OutboxRow.__slots__)
_COLUMNS = tuple(outbox.c[name] for name in _NAMES)

_LAG = select(func.clock_timestamp() - func.min(outbox.c.due_at)).where(outbox.c.due_at <= func.now())

_Hook = Callable[[AsyncConnection, Sequence[OutboxRow]], Coroutine[Any, Any, AfterCommit | None]]


def _measure(parcel: Parcel, report: Report) -> None:
    """Count a message by the broker's answer; of one that it has taken also how long its oldest row had been due."""
    first = parcel.rows[0]
    catalogue.MESSAGES_PUBLISHED.add(exchange=first.exchange, outcome=report.outcome.value)
    if report.outcome is Outcome.CONFIRMED:
        dwell_seconds = report.settled_ns / 1e9 - first.due_at.timestamp()
        catalogue.OUTBOX_DWELL.record(dwell_seconds, first.headers.get("traceparent"), exchange=first.exchange)


async def _guarded(
    connection: AsyncConnection, hook: _Hook, rows: Sequence[OutboxRow], after_commit: list[AfterCommit]
) -> bool:
    """Run a hook so that its failure undoes only its own work; False if it failed."""
    try:
        async with connection.begin_nested():
            act = await hook(connection, rows)
    except Exception as error:
        if is_unavailable(error):
            raise
        logger.exception("relay hook failed", extra={"count": len(rows), "outbox_id": rows[0].id, **_tasks_of(rows)})
        return False
    if act is not None:
        after_commit.append(act)
    return True


def _is_one_of(rows: Sequence[OutboxRow]) -> Any:
    # One array parameter, so that the statement is the same for every number of rows.
    return outbox.c.id == any_(literal([row.id for row in rows], ARRAY(BigInteger)))


def _put_back(rows: Sequence[OutboxRow], reason: str) -> Any:
    doubled = FIRST_DELAY_SECONDS * func.power(2.0, func.least(outbox.c.failures, 20))
    delay_seconds = func.least(LONGEST_DELAY_SECONDS, doubled)
    return (
        update(outbox)
        .where(_is_one_of(rows))
        .values(
            failures=outbox.c.failures + 1,
            last_error=reason[:1000],
            due_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, delay_seconds),
        )
    )


def _tasks_of(rows: Sequence[OutboxRow]) -> dict[str, Any]:
    """The facts of a log line about these rows: of the task, if there is one, or else some of their ids."""
    if len(rows) == 1 and rows[0].task_id is not None:
        return celery_protocol.log_facts(rows[0].headers)
    return logs.of_tasks(row.task_id for row in rows if row.task_id is not None)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, TransientError) else reason_of(error)
