"""How the mesh stands, as the reconciler that leads shows it.

A figure that cannot be known is not shown, and neither is one of a replica that does not lead: an old number would be
taken for a new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import observations, outstanding
from gateway.models import dead_letters
from gateway.observations import QueueFacts
from gateway.outstanding import Outstanding
from gateway.transactions import transaction
from taskmesh.errors import DatabaseUnavailable
from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.instruments import Gauge

PLACES: Final = ("accepted", "waiting", "running", "finished", "dead")

OF_AUDITS: Final = (catalogue.UNACCOUNTED_TASKS, catalogue.TASKS)
OF_LOOKS: Final = (
    catalogue.BROKER_REACHABLE,
    catalogue.QUEUE_MESSAGES,
    catalogue.QUEUE_CONSUMERS,
    catalogue.OLDEST_TASK_AGE,
    catalogue.WORK_OUTSTANDING,
    catalogue.DEAD_LETTERS_OPEN,
    catalogue.DEAD_LETTERS_OLDEST_AGE,
)

SHARE: Final = 20
"""A look that took long, at a ledger in which millions of tasks wait, is followed by a pause of so many times that."""


class Gauges:
    """Shows what the database knows of the mesh."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._rest_until = 0.0

    def show_audit(self, audit: Row[Any]) -> None:
        """Show what an audit has found, until the next one."""
        catalogue.UNACCOUNTED_TASKS.show([(audit.unaccounted, {})])
        catalogue.TASKS.show([(getattr(audit, place), {"place": place}) for place in PLACES])

    async def look(self) -> bool:
        """Show what the reconciler has last seen of the broker, and what there is to do; False to leave it as it is.

        Raises:
            DatabaseUnavailable: Nothing is known, and nothing shown any more.
        """
        if not instruments.is_on() or time.monotonic() < self._rest_until:
            return False
        began = time.monotonic()
        try:
            async with transaction(self._engine) as connection:
                await _show_broker(connection)
                _show_work((await outstanding.read(connection)).values())
                await _show_letters(connection)
        except DatabaseUnavailable:
            _hide(OF_LOOKS)
            raise
        finally:
            now = time.monotonic()
            self._rest_until = now + SHARE * (now - began)
        return True

    def hide(self) -> None:
        """Show nothing any more."""
        _hide((*OF_AUDITS, *OF_LOOKS))
        self._rest_until = 0.0


def _hide(gauges: Iterable[Gauge]) -> None:
    for gauge in gauges:
        gauge.hide()


async def _show_broker(connection: AsyncConnection) -> None:
    broker = await observations.broker(connection)
    if broker is None:
        return
    catalogue.BROKER_REACHABLE.show([(int(broker.reachable), {})])
    if not broker.reachable:
        # What is written of the queues is from before.
        _hide((catalogue.QUEUE_MESSAGES, catalogue.QUEUE_CONSUMERS))
        return
    queues = list((await observations.queues(connection)).values())
    catalogue.QUEUE_MESSAGES.show(shown for facts in queues for shown in _messages(facts))
    catalogue.QUEUE_CONSUMERS.show((facts.consumers, {"queue": facts.queue}) for facts in queues)


def _messages(facts: QueueFacts) -> list[tuple[float, Mapping[str, str | None]]]:
    figures = {"ready": facts.ready, "unacknowledged": facts.unacknowledged}
    return [(count, {"queue": facts.queue, "state": state}) for state, count in figures.items()]


def _show_work(services: Iterable[Outstanding]) -> None:
    known = list(services)
    catalogue.OLDEST_TASK_AGE.show(
        (one.oldest_age_seconds, {"service": one.service}) for one in known if one.oldest_age_seconds is not None
    )
    catalogue.WORK_OUTSTANDING.show(
        (one.work_seconds, {"service": one.service}) for one in known if one.work_seconds is not None
    )


async def _show_letters(connection: AsyncConnection) -> None:
    """Show open dead letters by service; a service that has announced itself and has none is shown with 0."""
    announced = (await connection.execute(text("select service from manifests"))).scalars()
    open_letters: dict[str, int] = dict.fromkeys(announced, 0)
    ages: dict[str, float] = {}
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    for row in await connection.execute(_OPEN_LETTERS):
        open_letters[row.service] = row.letters
        ages[row.service] = (now - row.oldest).total_seconds()
    catalogue.DEAD_LETTERS_OPEN.show((count, {"service": service}) for service, count in open_letters.items())
    catalogue.DEAD_LETTERS_OLDEST_AGE.show((age, {"service": service}) for service, age in ages.items())


# Written out, so that the planner sees that the partial index `dead_letters_open_service` covers it.
_OPEN_LETTERS = (
    select(
        dead_letters.c.service,
        func.count().label("letters"),
        func.min(dead_letters.c.received_at).label("oldest"),
    )
    .where(text("state = 'open'"), dead_letters.c.service.is_not(None))
    .group_by(dead_letters.c.service)
)
