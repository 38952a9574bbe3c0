"""The scheduler role: fires what is due, once, however many schedulers run.

One transaction locks the due schedules (SKIP LOCKED, so replicas share the work), claims each fire by the primary key
of `schedule_fires`, submits its task under an id derived from schedule and fire time, and moves `next_fire_at` on. A
scheduler that is killed at any point has either done all of that or nothing, and its locks go with its connection.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import assert_never
from uuid import UUID, uuid5

import psycopg
from opentelemetry.context import Context
from sqlalchemy import func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import ledger, measuring, models, schedules
from gateway.new_tasks import NewTask
from gateway.schedules import Fire, Misfire, Outcome, Overlap, Reason, Schedule
from gateway.settings import SchedulerSettings
from gateway.timetable import Timetable
from gateway.transactions import CONNECT_SECONDS, open_engine, transaction
from taskmesh import logs, telemetry, traces
from taskmesh.contracts.lifecycle import TERMINAL
from taskmesh.database import is_unavailable
from taskmesh.errors import DatabaseUnavailable
from taskmesh.health import Health
from taskmesh.listening import ListeningConnection
from taskmesh.traces import Relation

logger = logging.getLogger(__name__)

GRACE = timedelta(seconds=5)
"""A fire this late is on time: a busy machine or a database that restarts is not downtime."""

SLOTS_A_STEP = 100
"""How many fires of one schedule are made up in one transaction; the others are in the next ones."""

RETRY_AFTER = timedelta(seconds=30)
"""When a schedule whose fire failed is tried again; its fires stay due."""

LOCKED_PAUSE_SECONDS = 0.05
"""Pause when all that is due is locked by another scheduler, which is about to commit."""

LISTEN_AGAIN_SECONDS = 2.0
"""How long to wait before listening again after the connection was lost."""

LONGEST_PAUSE_SECONDS = 10.0
"""However rarely the schedules are polled, the process shows that it is alive."""

PRUNE_EVERY = timedelta(minutes=10)
PRUNE_LIMIT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about the fires of one schedule that are due.

    Attributes:
        slots: To be fired, oldest first.
        missed: First and last of the fires that are left out because nobody was there.
        next_fire_at: The fire after all of them; None when there is no more.
    """

    slots: list[datetime]
    missed: tuple[datetime, datetime] | None
    next_fire_at: datetime | None


@dataclass(frozen=True, slots=True)
class TypeOwner:
    """The service that announces a type, and the version that it announces."""

    service: str
    version: int


def task_id(schedule_id: UUID, fire_at: datetime) -> UUID:
    """Return the id of the task of one fire: the same whoever computes it."""
    return uuid5(schedule_id, fire_at.astimezone(UTC).isoformat())


def plan(schedule: Schedule, due_at: datetime, now: datetime) -> Plan:
    """Decide what is fired at `now`, when the oldest due fire is at `due_at`.

    When the oldest is no more than `GRACE` late, all that is due is fired. Otherwise the schedule was down, and its
    misfire policy decides.
    """
    timetable = schedule.fire_times()
    if now - due_at <= GRACE:
        return _fire_all(timetable, due_at, now)
    match schedule.misfire:
        case Misfire.SKIP | Misfire.ONCE:
            return _fire_newest(timetable, due_at, now, makes_up=schedule.misfire is Misfire.ONCE)
        case Misfire.ALL:
            window = max(timedelta(seconds=schedule.misfire_window_seconds), GRACE)
            if due_at >= now - window:
                return _fire_all(timetable, due_at, now)
            first = timetable.next_after(now - window - timedelta(microseconds=1))
            missed = (due_at, _last_before(timetable, due_at, now - window))
            if first is None or first > now:
                return Plan(slots=[], missed=missed, next_fire_at=first)
            return replace(_fire_all(timetable, first, now), missed=missed)
        case _ as never:
            assert_never(never)


async def fire_due(connection: AsyncConnection, now: datetime, limit: int = 100) -> list[Fire]:
    """Fire schedules that are due at `now` and that no other scheduler is firing, until `limit` fires are reached.

    The caller commits, and calls again until nothing is left. A schedule whose fire fails is noted and put off, and
    the others go on.

    Returns:
        What became of each fire, the left out included.

    Raises:
        sqlalchemy.exc.DBAPIError: The database is away; nothing has happened.
    """
    columns = models.schedules.c
    statement = (
        select(models.schedules)
        .where(
            columns.paused_at.is_(None),
            columns.next_fire_at <= now,
            or_(columns.retry_at.is_(None), columns.retry_at <= now),
        )
        .order_by(columns.next_fire_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    fires: list[Fire] = []
    for row in (await connection.execute(statement)).all():
        if len(fires) >= limit:
            # A backlog of made-up fires: the transaction stays short, the rest stays due.
            break
        try:
            async with connection.begin_nested():
                fires += await _fire(connection, schedules.from_row(row), row.next_fire_at, now)
        except Exception as error:
            # One of the loops that may catch everything: a schedule that cannot be fired must not hold up the others.
            if is_unavailable(error):
                raise
            await _put_off(connection, row.id, error, now)
    return fires


async def find_next_fire(connection: AsyncConnection) -> datetime | None:
    """Return when the next schedule is due; None when none is."""
    columns = models.schedules.c
    statement = select(func.min(columns.next_fire_at)).where(
        columns.paused_at.is_(None), columns.next_fire_at.is_not(None), columns.retry_at.is_(None)
    )
    found: datetime | None = (await connection.execute(statement)).scalar_one()
    return found


async def run(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Fire schedules until `stop` is set."""
    engine = open_engine(settings.database_url, pool_size=1, wait_seconds=5, role="scheduler")
    wake = asyncio.Event()
    listening = asyncio.create_task(_listen(settings.database_url.get_secret_value(), wake))
    health = Health(settings.health_dir, "gateway-scheduler")
    try:
        await Scheduler(engine, health, wake=wake, poll_seconds=settings.scheduler_poll_seconds).run(stop)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await engine.dispose()


async def _listen(database_url: str, wake: asyncio.Event) -> None:
    """Set `wake` whenever a schedule has changed; while this cannot listen, the poll finds changes."""
    while True:
        try:
            connection = await ListeningConnection.connect(
                database_url,
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name="gateway-scheduler-listen",
            )
            async with connection:
                await connection.execute(f"listen {models.SCHEDULES_CHANNEL}")
                # What changed while nobody listened.
                wake.set()
                async for _ in connection.notifies():
                    wake.set()
        except (psycopg.Error, OSError) as error:
            logger.debug("listening interrupted", extra={"exception": type(error).__qualname__})
        await asyncio.sleep(LISTEN_AGAIN_SECONDS)


class Scheduler:
    """Fires schedules until it is told to stop.

    Args:
        wake: Set by whoever hears that a schedule has changed; the poll finds it a little later otherwise.
        poll_seconds: The longest wait; also how soon a schedule that was put off is looked at again.
    """

    def __init__(
        self, engine: AsyncEngine, health: Health, *, wake: asyncio.Event | None = None, poll_seconds: float = 1.0
    ) -> None:
        self._engine = engine
        self._health = health
        self._wake = wake or asyncio.Event()
        self._poll_seconds = min(poll_seconds, LONGEST_PAUSE_SECONDS)
        self._prune_at: datetime | None = None
        self._failures = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Fire what is due until `stop` is set; outlast any outage of the database."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                pause_seconds = await self._turn()
                self._health.beat()
                await self._pause(pause_seconds, stopping)
        finally:
            stopping.cancel()
            self._health.stopped()

    async def _turn(self) -> float:
        """Do one transaction; return how many seconds nothing will be due."""
        try:
            async with transaction(self._engine) as connection:
                now = await schedules.clock(connection)
                fires = await fire_due(connection, now)
                next_fire_at = await find_next_fire(connection)
                await self._prune(connection, now)
        except DatabaseUnavailable as error:
            if self._failures == 0:
                logger.warning("database unavailable", extra={"reason": str(error)})
            return self._back_off()
        except Exception:
            # One of the loops that may catch everything. Each schedule is fired by itself, so this is about none of
            # them alone: a person must look.
            logger.exception("scheduler turn failed")
            return self._back_off()
        if self._failures:
            logger.info("database available", extra={"failures": self._failures})
            self._failures = 0
        self._health.ready()
        _report(fires)
        measuring.count_fires(fires)
        if fires:
            return 0.0
        if next_fire_at is None:
            return self._poll_seconds
        # Waking up a little early would only mean another turn, so no margin.
        return min(max((next_fire_at - now).total_seconds(), LOCKED_PAUSE_SECONDS), self._poll_seconds)

    def _back_off(self) -> float:
        self._failures += 1
        return float(min(0.2 * 2 ** min(self._failures, 5), 5.0))

    async def _pause(self, seconds: float, stopping: asyncio.Task[bool]) -> None:
        waking = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({waking, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waking.cancel()

    async def _prune(self, connection: AsyncConnection, now: datetime) -> None:
        if self._prune_at is not None and now < self._prune_at:
            return
        await schedules.prune_fires(connection, now=now, limit=PRUNE_LIMIT)
        self._prune_at = now + PRUNE_EVERY


async def _fire(connection: AsyncConnection, schedule: Schedule, due_at: datetime, now: datetime) -> list[Fire]:
    planned = plan(schedule, due_at, now)
    owner = await _find_type(connection, schedule.type)
    going = schedule.overlap is Overlap.SKIP and await _is_going(connection, schedule.last_task_id)
    fires: list[Fire] = []
    if planned.missed is not None:
        first, last = planned.missed
        left_out = _fire_of(schedule, first, now, reason=Reason.MISSED, missed_until=last)
        fires += [left_out] if await _claim(connection, left_out) else []
    for slot in planned.slots:
        if going:
            fire = _fire_of(schedule, slot, now, reason=Reason.OVERLAP)
        else:
            reason = None if owner else Reason.UNKNOWN_TYPE
            fire = _fire_of(schedule, slot, now, reason=reason, submits=task_id(schedule.id, slot))
        # Not ours when it was fired before, under a clock that has been set back since: then it is done.
        if await _claim(connection, fire):
            fires.append(fire)
            going = schedule.overlap is Overlap.SKIP
    submitted = [fire for fire in fires if fire.outcome is Outcome.SUBMITTED]
    tasks = [_task(schedule, fire, owner) for fire in submitted]
    await ledger.submit(connection, tasks)
    await connection.execute(
        update(models.schedules)
        .where(models.schedules.c.id == schedule.id)
        .values(
            next_fire_at=planned.next_fire_at,
            last_fire_at=submitted[-1].fire_at if submitted else schedule.last_fire_at,
            last_task_id=submitted[-1].task_id if submitted else schedule.last_task_id,
            last_error=None if owner else f"no service announces {schedule.type}: its tasks wait for one",
            retry_at=None,
        )
    )
    trace_ids: dict[UUID | None, str | None] = {task.id: task.creation.trace_id for task in tasks}
    return [replace(fire, type=schedule.type, trace_id=trace_ids.get(fire.task_id)) for fire in fires]


def _task(schedule: Schedule, fire: Fire, owner: TypeOwner | None) -> NewTask:
    assert fire.task_id is not None
    attributes = {
        "taskmesh.schedule.id": str(schedule.id),
        "taskmesh.task.id": str(fire.task_id),
        "taskmesh.task.type": schedule.type,
    }
    # Each fire begins a trace of its own.
    links = traces.links_to({Relation.SCHEDULED.of: schedule.traceparent} if schedule.traceparent else {})
    with telemetry.tracer().start_as_current_span("fire schedule", Context(), attributes=attributes, links=links):
        creation = traces.going_on()
        return NewTask(
            id=fire.task_id,
            type=schedule.type,
            service=owner.service if owner else schedule.type.partition(".")[0],
            version=owner.version if owner else 1,
            payload=schedule.payload,
            priority=schedule.priority,
            tags=schedule.tags,
            schedule_id=schedule.id,
            api_key_id=schedule.api_key_id,
            created_at=fire.fired_at,
            creation=creation if creation.traceparent else traces.unrecorded(),
        )


_FIND_TYPE = text(
    """
    select manifests.service, cast(announced ->> 'version' as integer) as version
    from manifests, jsonb_array_elements(manifests.manifest -> 'types') as announced
    where announced ->> 'type' = :type and announced ->> 'kind' = 'command'
    limit 1
    """
)


async def _find_type(connection: AsyncConnection, type_name: str) -> TypeOwner | None:
    row = (await connection.execute(_FIND_TYPE, {"type": type_name})).first()
    return TypeOwner(row.service, row.version) if row else None


async def _claim(connection: AsyncConnection, fire: Fire) -> bool:
    claimed = await connection.execute(
        insert(models.schedule_fires)
        .values(
            schedule_id=fire.schedule_id,
            fire_at=fire.fire_at,
            outcome=fire.outcome,
            reason=fire.reason,
            missed_until=fire.missed_until,
            task_id=fire.task_id,
            fired_at=fire.fired_at,
        )
        .on_conflict_do_nothing()
        .returning(models.schedule_fires.c.schedule_id)
    )
    return claimed.first() is not None


async def _is_going(connection: AsyncConnection, last_task_id: UUID | None) -> bool:
    if last_task_id is None:
        return False
    statement = select(models.tasks.c.state).where(models.tasks.c.id == last_task_id)
    state = (await connection.execute(statement)).scalar_one_or_none()
    return state is not None and state not in TERMINAL


async def _put_off(connection: AsyncConnection, schedule_id: UUID, error: Exception, now: datetime) -> None:
    # The text of an unforeseen exception may quote a payload; the log has its traceback.
    logger.error("schedule not fired", exc_info=error, extra={"schedule_id": str(schedule_id)})
    await connection.execute(
        update(models.schedules)
        .where(models.schedules.c.id == schedule_id)
        .values(last_error=f"could not be fired: {type(error).__name__}", retry_at=now + RETRY_AFTER)
    )


def _fire_of(
    schedule: Schedule,
    fire_at: datetime,
    now: datetime,
    *,
    reason: Reason | None,
    submits: UUID | None = None,
    missed_until: datetime | None = None,
) -> Fire:
    return Fire(
        schedule_id=schedule.id,
        fire_at=fire_at,
        outcome=Outcome.SKIPPED if submits is None else Outcome.SUBMITTED,
        reason=reason,
        missed_until=missed_until,
        task_id=submits,
        fired_at=now,
        type=schedule.type,
    )


def _fire_all(timetable: Timetable, first: datetime, now: datetime) -> Plan:
    slots = [first, *timetable.fires_between(first, now, SLOTS_A_STEP - 1)]
    return Plan(slots=slots, missed=None, next_fire_at=timetable.next_after(slots[-1]))


def _fire_newest(timetable: Timetable, due_at: datetime, now: datetime, *, makes_up: bool) -> Plan:
    newest = max(timetable.last_until(now) or due_at, due_at)
    next_fire_at = timetable.next_after(newest)
    if not makes_up and now - newest > GRACE:
        return Plan(slots=[], missed=(due_at, newest), next_fire_at=next_fire_at)
    missed = (due_at, _last_before(timetable, due_at, newest)) if newest > due_at else None
    return Plan(slots=[newest], missed=missed, next_fire_at=next_fire_at)


def _last_before(timetable: Timetable, due_at: datetime, moment: datetime) -> datetime:
    return max(timetable.last_until(moment - timedelta(microseconds=1)) or due_at, due_at)


def _report(fires: list[Fire]) -> None:
    for fire in fires:
        logger.info(
            "schedule fired" if fire.outcome is Outcome.SUBMITTED else "schedule fire skipped",
            extra={
                "schedule_id": str(fire.schedule_id),
                "fire_at": fire.fire_at.isoformat(),
                "reason": fire.reason,
                **logs.of_task(fire.task_id, fire.type, 0 if fire.task_id else None, trace_id=fire.trace_id),
            },
        )
