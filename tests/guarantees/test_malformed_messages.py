"""Malformed messages of every kind: no process dies or stalls, each is a dead letter with the right code."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest
from hypothesis.strategies import SearchStrategy

from running_gateway import Gateway, running_gateway
from running_orders import Orders, orders_service
from taskmesh import exchanges
from taskmesh.parts.rabbitmq import RabbitMQ
from taskmesh.testing.waiting import eventually

from .malformed import FOR_THE_PROJECTOR, FOR_WORKERS, Message, examples

# Under the load of a whole suite.
pytestmark = pytest.mark.timeout(300)

NORMALLY = 256
MANY = 10_000


@pytest.fixture(scope="module")
def orders(postgres: str, rabbitmq: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    with orders_service(postgres, rabbitmq, tmp_path_factory.mktemp("orders")) as service:
        yield service


@pytest.fixture(scope="module")
def ledger(postgres: str, orders: Orders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(postgres, orders.amqp_url, orders.management_url, folder, "projector") as gateway:
        eventually(lambda: gateway.rows("select 1 from manifests where service = 'orders'"))
        yield gateway


def test_into_a_workers_queue(orders: Orders, ledger: Gateway) -> None:
    _flood_worker(orders, ledger, NORMALLY)


def test_into_the_projectors_queue(orders: Orders, ledger: Gateway) -> None:
    _flood_projector(orders, ledger, NORMALLY)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_ten_thousand_into_each_queue(orders: Orders, ledger: Gateway) -> None:
    print(_flood_worker(orders, ledger, MANY))  # noqa: T201 - seen with `-s`
    print(_flood_projector(orders, ledger, MANY))  # noqa: T201


def _flood_worker(orders: Orders, ledger: Gateway, count: int) -> str:
    begin = time.monotonic()
    before = _pids(orders, ledger)
    sent = _publish(orders, exchanges.COMMANDS, FOR_WORKERS, count)
    last = orders.send("orders.order.place", name="the last")

    assert orders.wait(last) == "succeeded"
    _check(ledger, sent)
    assert orders.notes(last) == ["the last"]
    assert _pids(orders, ledger) == before
    return _figures(sent, time.monotonic() - begin)


def _flood_projector(orders: Orders, ledger: Gateway, count: int) -> str:
    begin = time.monotonic()
    before = _pids(orders, ledger)
    sent = _publish(orders, exchanges.LIFECYCLE, FOR_THE_PROJECTOR, count)
    last = orders.send("orders.order.place", name="the last")

    assert ledger.outcome(last)["state"] == "succeeded"
    _check(ledger, sent)
    assert _pids(orders, ledger) == before
    return _figures(sent, time.monotonic() - begin)


def _figures(sent: Mapping[str, tuple[str, str]], seconds: float) -> str:
    kinds = Counter(kind for kind, _ in sent.values())
    return f"{len(sent)} messages of {len(kinds)} kinds in {seconds:.0f} s: {dict(kinds)}"


def _publish(
    orders: Orders, exchange: str, kinds: Mapping[str, SearchStrategy[Message]], count: int
) -> dict[str, tuple[str, str]]:
    """Publish examples, and return kind and expected code of each by its message id."""
    sent: dict[str, tuple[str, str]] = {}
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for kind, message in examples(kinds, count):
            message_id = str(uuid4())
            channel.basic_publish(exchange, message.key, message.body, message.encoded(message_id), mandatory=True)
            sent[message_id] = (kind, message.code)
    return sent


def _check(ledger: Gateway, sent: Mapping[str, tuple[str, str]]) -> None:
    """Every message has become one dead letter, which says what is wrong with it."""
    stored: dict[str, Any] = {}

    def all_stored() -> bool:
        rows = ledger.rows("select properties ->> 'message_id' as message_id, code, error from dead_letters")
        stored.update({row["message_id"]: row for row in rows if row["message_id"] in sent})
        return len(stored) == len(sent)

    eventually(all_stored, seconds=600, explain=lambda: _missing(sent, stored))
    count = ledger.rows("select count(*) from dead_letters where properties ->> 'message_id' = any(%s)", list(sent))[0][
        "count"
    ]
    assert count == len(sent)
    wrong = {
        (kind, code, stored[message_id]["code"], stored[message_id]["error"])
        for message_id, (kind, code) in sent.items()
        if stored[message_id]["code"] != code
    }
    assert not wrong


def _missing(sent: Mapping[str, tuple[str, str]], stored: Mapping[str, Any]) -> str:
    return str(Counter(kind for message_id, (kind, _) in sent.items() if message_id not in stored))


def _pids(orders: Orders, ledger: Gateway) -> dict[str, int]:
    """The processes that are alive, the worker's children included."""
    processes = {**orders.processes, **{f"gateway-{name}": one for name, one in ledger.processes.items()}}
    alive = {name: process.pid for name, process in processes.items() if process.poll() is None}
    children = Path(f"/proc/{orders.processes['worker'].pid}/task/{orders.processes['worker'].pid}/children")
    return {**alive, **{f"child {pid}": int(pid) for pid in children.read_text().split()}}
