"""What the reconciler sees of a real broker, through a user that may do nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from gateway import observations
from gateway.observing import Observer, facts_of, service_of
from taskmesh.errors import PermanentError
from taskmesh.management import Management
from taskmesh.parts.rabbitmq import create_observer
from taskmesh.topology import declare, worker_topology

NOW = datetime.now(UTC)


async def test_the_queues_of_a_broker_are_seen_by_a_user_without_rights(broker, gateway_engine, eventually):
    with Management(broker.management_url) as management:
        declare(worker_topology("greeter", []), amqp_url=broker.amqp_url, management=management)
    observer = Observer(gateway_engine, SecretStr(create_observer(broker, broker.vhost)), broker.vhost)

    async def seen():
        assert await observer.look()
        async with gateway_engine.connect() as connection:
            return await observations.queue(connection, "greeter.control")

    await eventually(seen)
    facts = await seen()
    assert (facts.service, facts.messages, facts.consumers) == ("greeter", 0, 0)


def test_the_observer_may_change_nothing(broker):
    with Management(create_observer(broker, broker.vhost)) as management, pytest.raises(PermanentError):
        management.put_policy(broker.vhost, "p", pattern=".*", definition={"max-length": 1}, apply_to="queues")


async def test_a_broker_that_does_not_answer_is_written_down_since_then(gateway_engine):
    observer = Observer(gateway_engine, SecretStr("http://u:p@127.0.0.1:1"), "/")
    assert not await observer.look()
    async with gateway_engine.connect() as connection:
        first = await observations.broker(connection)

    assert not await observer.look()

    async with gateway_engine.connect() as connection:
        second = await observations.broker(connection)
    assert first is not None
    assert second is not None
    assert (second.reachable, second.since) == (False, first.since)
    assert second.observed_at > first.observed_at
    assert "127.0.0.1" not in (second.error or "")


async def test_a_queue_that_is_gone_is_forgotten(gateway_engine):
    known = {"state": "running", "messages_ready": 1, "messages_unacknowledged": 2, "consumers": 3}
    async with gateway_engine.begin() as connection:
        both = [{"name": "greeter", **known}, {"name": "greeter.events", **known}]
        await observations.store_queues(connection, facts_of(both, NOW))
        await observations.store_queues(connection, facts_of(both[:1], NOW))
        assert list(await observations.queues(connection)) == ["greeter"]


@pytest.mark.parametrize(
    "said",
    [
        {"name": "greeter"},
        {"name": "greeter", "messages_ready": None, "messages_unacknowledged": None, "consumers": 0},
        {"name": "greeter", "state": "down", "messages_ready": 0, "messages_unacknowledged": 0, "consumers": 0},
        {"name": "Somebody's", "messages_ready": 0, "messages_unacknowledged": 0, "consumers": 0},
    ],
    ids=["declared a moment ago", "without figures", "without a majority", "not the mesh's"],
)
def test_a_queue_whose_figures_mean_nothing_is_left_out(said):
    assert list(facts_of([said], NOW)) == []


@pytest.mark.parametrize(
    ("queue", "service"),
    [
        ("billing", "billing"),
        ("billing.events", "billing"),
        ("billing.control", "billing"),
        ("gateway.dead-letters", "gateway"),
        ("billing.other", None),
        ("amq.gen-1", None),
    ],
)
def test_the_service_of_a_queue_is_in_its_name(queue, service):
    assert service_of(queue) == service
