"""One audit: every unfinished task that has been silent for a while is accounted for, or named.

An audit is many short transactions, each of which may be the last one before the process is killed: the next audit
begins anew and finds what was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import (
    audits,
    candidates,
    inquiries,
    ledger,
    measuring,
    observations,
    redriving,
    schedules,
    sightings,
    tallies,
    unaccounted,
)
from gateway.candidates import BEGINNING, Candidate, Cursor
from gateway.inquiries import Question, Questions
from gateway.observations import BrokerFacts, QueueFacts
from gateway.progress import OUTCOME_LOST
from gateway.sightings import Seen
from gateway.tallies import Tally
from gateway.transactions import transaction
from gateway.unaccounted import Record
from gateway.verdicts import FIGURES_LAG, Evidence, judge
from taskmesh import logs
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskState

logger = logging.getLogger(__name__)

MOST_EXAMINED: Final = 20_000
MOST_DOUBTFUL: Final = 5_000
"""Tasks of one audit for which services are asked; the next audit goes on behind them."""

ANSWER_SECONDS: Final = 15.0
POLL_SECONDS: Final = 1.0
MENDED_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class _Silent:
    """The tasks that an audit examines.

    Attributes:
        cursor: Where the next audit goes on; None for the beginning.
        complete: These are all there are.
    """

    tasks: Sequence[Candidate]
    cursor: Cursor | None
    complete: bool


class Reconciler:
    """Audits the ledger.

    Args:
        engine: Of the gateway's database.
        answered: Set by whoever hears that services have answered; without it answers are found a little later.
        redrive: Send again what is unaccounted for and can be sent again.
        figures_lag: How old figures of queues may be beyond what they say.
        fresh: Older observations say nothing.
        answer_seconds: How long services may take to answer.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        answered: asyncio.Event | None = None,
        redrive: bool = True,
        figures_lag: timedelta = FIGURES_LAG,
        fresh: timedelta = timedelta(seconds=30),
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._engine = engine
        self._answered = answered or asyncio.Event()
        self._redrive = redrive
        self._lag = figures_lag
        self._fresh = fresh
        self._answer_seconds = answer_seconds

    async def audit(self, *, grace: timedelta) -> Row[Any]:
        """Audit once, and return the audit as it was written down.

        Args:
            grace: Tasks with newer news than that are on their way.

        Raises:
            DatabaseUnavailable: It came to no end; what it has done is done.
        """
        async with transaction(self._engine) as connection:
            now = await schedules.clock(connection)
            previous = await audits.last(connection)
            await unaccounted.drop_ended(connection)
            records = await unaccounted.read(connection)
            broker = await observations.broker(connection)
            queues = await observations.queues(connection)
        silent = await self._find_silent(now - grace, previous, records)
        doubtful = [one for one in silent.tasks if not one.in_outbox and not one.is_dead]
        usable = queues if self._is_fresh(broker, now) else None
        asked = await self._ask(doubtful, usable, now) if usable is not None else Questions()
        seen = await self._wait_for_answers(asked)
        verdicts = judge(silent.tasks, Evidence(at=now, queues=usable, answers=seen, records=records, lag=self._lag))
        async with transaction(self._engine) as connection:
            await unaccounted.suspect(connection, verdicts.suspects, at=now)
            await unaccounted.name(connection, verdicts.named, at=now)
            await unaccounted.clear(connection, set(verdicts.accounted) & records.keys())
        await self._mend(verdicts.ended, now)
        redriven = await self._send_again(verdicts.named, seen, records, now) if self._redrive else []
        detail = {
            "grace_seconds": grace.total_seconds(),
            "examined": len(silent.tasks),
            "complete": silent.complete,
            "suspected": len(verdicts.suspects) - len(verdicts.named) - len(verdicts.ended),
            "mended": len(verdicts.ended),
            "unknown": dict(verdicts.unknown),
            "gaps": [asdict(gap) for gap in verdicts.gaps],
            "cursor": silent.cursor.to_json() if silent.cursor else None,
        }
        return await self._conclude(detail, sum(gap.missing for gap in verdicts.gaps), now, previous, redriven)

    def _is_fresh(self, broker: BrokerFacts | None, now: datetime) -> bool:
        return broker is not None and broker.reachable and now - broker.observed_at <= self._fresh

    async def _find_silent(
        self, heard_before: datetime, previous: Row[Any] | None, records: Mapping[UUID, Record]
    ) -> _Silent:
        """Return whom earlier audits have suspected, and others from where the audit before has stopped."""
        async with transaction(self._engine) as connection:
            found = {one.id: one for one in await candidates.of_tasks(connection, records)}
        said = previous.detail.get("cursor") if previous is not None else None
        cursor: Cursor | None = Cursor.from_json(said) if said else BEGINNING
        from_beginning = cursor == BEGINNING
        doubtful = 0
        while cursor is not None and len(found) < MOST_EXAMINED and doubtful < MOST_DOUBTFUL:
            async with transaction(self._engine) as connection:
                page, cursor = await candidates.page(connection, heard_before=heard_before, cursor=cursor)
            found |= {one.id: one for one in page}
            doubtful += sum(not one.in_outbox and not one.is_dead for one in page)
        return _Silent(tasks=list(found.values()), cursor=cursor, complete=from_beginning and cursor is None)

    async def _ask(self, doubtful: Iterable[Candidate], queues: Mapping[str, QueueFacts], now: datetime) -> Questions:
        async with transaction(self._engine) as connection:
            return await inquiries.ask(connection, inquiries.questions_about(doubtful), queues, at=now)

    async def _wait_for_answers(self, asked: Questions) -> Mapping[Question, Seen]:
        """Return what services have answered, as soon as all have or the time is over."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._answer_seconds
        while asked.inquiries:
            self._answered.clear()
            async with transaction(self._engine) as connection:
                if await inquiries.is_answered(connection, asked) or clock() >= deadline:
                    return await inquiries.answers(connection, asked)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._answered.wait(), POLL_SECONDS)
        return {}

    async def _mend(self, ended: Sequence[tuple[Candidate, Seen]], now: datetime) -> None:
        """Tell the ledger of tasks that have ended in their service, and whose lifecycle event never came."""
        for start in range(0, len(ended), MENDED_AT_ONCE):
            some = ended[start : start + MENDED_AT_ONCE]
            async with transaction(self._engine) as connection:
                steps = await ledger.advance(connection, [_outcome(candidate, seen, now) for candidate, seen in some])
                await unaccounted.clear(connection, [candidate.id for candidate, _ in some])
            measuring.count_steps(steps)
        if ended:
            logger.warning("lost outcomes mended", extra=_ids([candidate.id for candidate, _ in ended]))

    async def _send_again(
        self, named: Iterable[UUID], seen: Mapping[Question, Seen], records: Mapping[UUID, Record], now: datetime
    ) -> list[UUID]:
        due = [task_id for task_id in named if redriving.is_due(records[task_id], now)][: redriving.AT_ONCE]
        if not due:
            return []
        async with transaction(self._engine) as connection:
            last_seen = {task_id: seen[task_id, records[task_id].service] for task_id in due}
            redriven = await redriving.redrive(connection, last_seen, at=now)
        if redriven:
            logger.warning("tasks re-driven", extra=_ids(redriven))
        return redriven

    async def _conclude(
        self,
        detail: Mapping[str, Any],
        unnamed: int,
        started_at: datetime,
        previous: Row[Any] | None,
        redriven: Collection[UUID],
    ) -> Row[Any]:
        known = previous.detail.get("tally") if previous is not None else None
        tally = await tallies.bring_forward(self._engine, Tally.from_json(known) if known else None, now=started_at)
        detail = {**detail, "tally": tally.to_json()}
        async with transaction(self._engine) as connection:
            await sightings.forget(connection, started_at - sightings.REMEMBERED_FOR)
            balance = await audits.balance(connection, tally, unnamed=unnamed)
            audit = await audits.store(
                connection, balance, started_at=started_at, redriven=len(redriven), detail=detail
            )
            named = await unaccounted.named(connection, limit=logs.IDS_LOGGED)
        before = previous.unaccounted if previous is not None else 0
        if audit.unaccounted and not before:
            facts = {"count": audit.unaccounted, **logs.of_tasks(record.task_id for record in named)}
            logger.error("tasks unaccounted for", extra=facts)
        elif before and not audit.unaccounted:
            logger.info("all tasks accounted for", extra={"accepted": audit.accepted})
        return audit


def _outcome(candidate: Candidate, seen: Seen, now: datetime) -> LifecycleEvent:
    """What the lost lifecycle event has said, as far as the inbox knows: its result, or its reason, is gone."""
    state = TaskState(seen.state)
    failure = None
    if state is TaskState.FAILED:
        text = f"{candidate.service} has recorded that it failed; the report that said why was lost"
        failure = TaskFailure(code=OUTCOME_LOST, message=text)
    return LifecycleEvent(
        task_id=candidate.id,
        type=candidate.type,
        state=state,
        at=now,
        service=candidate.service,
        kind=candidate.kind,
        sequence=max(seen.sequence or 0, candidate.sequence),
        attempt=seen.starts or 0,
        root_id=candidate.root_id,
        parent_id=candidate.parent_id,
        event_id=candidate.event_id,
        started_at=seen.started_at,
        worker=seen.worker,
        failure=failure,
    )


def _ids(task_ids: Collection[UUID]) -> dict[str, Any]:
    return {"count": len(task_ids), **logs.of_tasks(task_ids)}
