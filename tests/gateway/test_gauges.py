"""How the mesh stands is shown as far as it is known, and by nobody who does not lead."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from pydantic import SecretStr
from sqlalchemy import insert

from gateway import catalogue as types
from gateway import ledger, observations
from gateway.gauges import OF_AUDITS, OF_LOOKS, Gauges
from gateway.models import dead_letters
from gateway.new_tasks import NewTask
from gateway.observations import QueueFacts
from gateway.transactions import open_engine
from taskmesh.errors import DatabaseUnavailable
from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.instruments import Gauge

from .conftest import manifest

GAUGES = (*OF_AUDITS, *OF_LOOKS)


class Nobody:
    """Takes measurements, so that metrics are on."""

    def measure(self, *_: object) -> None:
        """Forget it."""


def shown(gauge: Gauge, *attributes: str) -> Mapping[object, float]:
    return {tuple(found[name] for name in attributes): value for value, found in gauge.read()}


async def observe(engine, *, reachable: bool = True) -> None:
    now = datetime.now(UTC)
    facts = [
        QueueFacts(queue=name, service=name.partition(".")[0], ready=2, unacknowledged=1, consumers=3, observed_at=now)
        for name in ("greeter", "gateway.lifecycle")
    ]
    async with engine.begin() as connection:
        await observations.store_queues(connection, facts)
        await observations.store_broker(connection, reachable=reachable, at=now)


async def keep_letter(engine, received_at: datetime, **fields: object) -> None:
    row = {
        "fingerprint": str(received_at).encode(),
        "reason": "rejected",
        "queue": "greeter",
        "exchange": "taskmesh.commands",
        "routing_key": "greeter.person.greet",
        "headers": {},
        "properties": {},
        "body": b"",
        "service": "greeter",
        "received_at": received_at,
    }
    async with engine.begin() as connection:
        await connection.execute(insert(dead_letters).values(**row | fields))


@pytest.fixture
async def gauges(gateway_engine):
    """Those of a reconciler that leads, for a ledger that one service has announced itself to."""
    async with gateway_engine.begin() as connection:
        await types.store(connection, manifest())
    instruments.send_to(Nobody())
    made = Gauges(gateway_engine)
    yield made
    made.hide()
    instruments.send_to(None)


async def test_what_is_known_of_queues_work_and_dead_letters_is_shown(gauges, gateway_engine):
    await observe(gateway_engine)
    task = NewTask(type="greeter.person.greet", service="greeter", payload={})
    async with gateway_engine.begin() as connection:
        await ledger.submit(connection, [task])
    now = datetime.now(UTC)
    await keep_letter(gateway_engine, now - timedelta(hours=2))
    await keep_letter(gateway_engine, now - timedelta(hours=3))
    await keep_letter(gateway_engine, now - timedelta(hours=9), state="discarded")

    assert await gauges.look()

    assert shown(catalogue.BROKER_REACHABLE) == {(): 1}
    assert shown(catalogue.QUEUE_MESSAGES, "queue", "state")["greeter", "ready"] == 2
    assert shown(catalogue.QUEUE_MESSAGES, "queue", "state")["greeter", "unacknowledged"] == 1
    assert shown(catalogue.QUEUE_CONSUMERS, "queue")["gateway.lifecycle",] == 3
    assert shown(catalogue.WORK_OUTSTANDING, "service") == {("greeter",): 2}
    assert 0 <= shown(catalogue.OLDEST_TASK_AGE, "service")["greeter",] < 60
    assert shown(catalogue.DEAD_LETTERS_OPEN, "service") == {("greeter",): 2}
    assert shown(catalogue.DEAD_LETTERS_OLDEST_AGE, "service")["greeter",] == pytest.approx(3 * 3600, abs=60)


async def test_a_service_without_dead_letters_shows_none_and_no_age(gauges, gateway_engine):
    await observe(gateway_engine)

    await gauges.look()

    assert shown(catalogue.DEAD_LETTERS_OPEN, "service") == {("greeter",): 0}
    assert shown(catalogue.DEAD_LETTERS_OLDEST_AGE) == {}


async def test_old_figures_of_queues_are_not_shown_while_the_broker_is_away(gauges, gateway_engine):
    await observe(gateway_engine)
    await gauges.look()
    await observe(gateway_engine, reachable=False)
    gauges.hide()

    await gauges.look()

    assert shown(catalogue.BROKER_REACHABLE) == {(): 0}
    for gauge in (catalogue.QUEUE_MESSAGES, catalogue.QUEUE_CONSUMERS, catalogue.WORK_OUTSTANDING):
        assert gauge.read() == []


async def test_nothing_is_shown_while_the_database_is_away(gauges, gateway_engine):
    await observe(gateway_engine)
    await gauges.look()
    gone = open_engine(SecretStr("postgresql://nobody@127.0.0.1:1/x"), pool_size=1, wait_seconds=1, role="test")

    with pytest.raises(DatabaseUnavailable):
        await Gauges(gone).look()

    assert not [gauge.name for gauge in GAUGES if gauge.read()]
    await gone.dispose()


async def test_a_replica_that_does_not_lead_any_more_shows_nothing(gauges, gateway_engine):
    await observe(gateway_engine)
    await gauges.look()
    gauges.show_audit(SimpleNamespace(unaccounted=1, accepted=3, waiting=2, running=0, finished=0, dead=0))
    assert shown(catalogue.UNACCOUNTED_TASKS) == {(): 1}
    assert shown(catalogue.TASKS, "place")["accepted",] == 3

    gauges.hide()

    assert not [gauge.name for gauge in GAUGES if gauge.read()]


async def test_nothing_is_looked_up_while_nobody_exports(gauges, gateway_engine):
    await observe(gateway_engine)
    instruments.send_to(None)

    assert not await gauges.look()

    assert not [gauge.name for gauge in GAUGES if gauge.read()]
