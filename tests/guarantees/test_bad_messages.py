"""A message that cannot be run, or must not be, is nobody's loss: the ledger says why, and the message is kept."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pika
import pytest

from running_gateway import Gateway
from taskmesh import celery_protocol, control
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.control import Cancellation
from taskmesh.testing.waiting import eventually

from .conftest import Fragile

TYPE = "orders.loss.whole"


def publish(
    orders: Fragile,
    body: bytes,
    headers: dict[str, Any],
    routing_key: str = TYPE,
    *,
    content_type: str = "application/json",
) -> None:
    """Send a message of any form into the worker's queue."""
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        properties = pika.BasicProperties(
            headers=headers, content_type=content_type, content_encoding="utf-8", delivery_mode=2
        )
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("taskmesh.commands", routing_key, body, properties, mandatory=True)


def good_message() -> tuple[str, bytes, dict[str, Any]]:
    """A task's id, and its message's body and headers."""
    task_id = uuid4()
    headers, _, body = celery_protocol.encode(TaskMessage(type=TYPE, id=task_id, payload={}))
    return str(task_id), body, dict(headers)


def assert_dead(orders: Fragile, ledger: Gateway, task_id: str, *codes: str) -> None:
    """The task is failed with one of the codes, its message is kept, and it has not run; a good task still does."""
    outcome = ledger.outcome(task_id)
    assert outcome["state"] == "failed"
    [letter] = eventually(lambda: ledger.letters(task_id))
    assert letter["reason"] == "rejected" and letter["queue"] == "orders"
    assert (letter["code"] or outcome["error"]["code"]) in codes
    assert orders.starts(task_id) == 0
    good = orders.send(TYPE)
    orders.release(good)
    assert ledger.outcome(good)["state"] == "succeeded"


def test_unknown_task(orders: Fragile, ledger: Gateway) -> None:
    task_id = orders.send("orders.no.such")

    assert_dead(orders, ledger, task_id, "unknown_task")


@pytest.mark.parametrize("body", [b"no json", b"\xff\xfe", b""], ids=["no JSON", "no UTF-8", "empty"])
def test_undecodable_body(orders: Fragile, ledger: Gateway, body: bytes) -> None:
    task_id, _, headers = good_message()
    publish(orders, body, headers)

    assert_dead(orders, ledger, task_id, "malformed", "undecodable")


@pytest.mark.parametrize("body", [17, {}, [[], {}], [{}, [], {}]], ids=["number", "object", "pair", "swapped"])
def test_wrongly_typed_body(orders: Fragile, ledger: Gateway, body: object) -> None:
    task_id, _, headers = good_message()
    publish(orders, json.dumps(body).encode(), headers)

    assert_dead(orders, ledger, task_id, "malformed", "undecodable")


@pytest.mark.parametrize(
    "wrong", [{"timelimit": "soon"}, {"retries": "many"}, {"eta": "tomorrow"}], ids=["timelimit", "retries", "eta"]
)
def test_malformed_headers(orders: Fragile, ledger: Gateway, wrong: dict[str, Any]) -> None:
    task_id, body, headers = good_message()
    publish(orders, body, headers | wrong)

    assert_dead(orders, ledger, task_id, "malformed", "undecodable")


def test_contract_violation(orders: Fragile, ledger: Gateway) -> None:
    """The reason names the field, and never quotes what it held."""
    task_id = orders.send("orders.order.place", name="tea", mode="secret")

    assert_dead(orders, ledger, task_id, "contract_violation")
    error = ledger.outcome(task_id)["error"]
    assert "/mode" in error["message"] and "secret" not in json.dumps(error)


def test_expired(orders: Fragile, ledger: Gateway) -> None:
    """A task that is too late ends `expired`, and is not run."""
    task_id = orders.send(TYPE, expires=datetime.now(UTC) - timedelta(seconds=5))

    assert ledger.outcome(task_id)["state"] == "expired"
    assert orders.starts(task_id) == 0


def test_revoked(orders: Fragile, ledger: Gateway) -> None:
    """A task that was cancelled while no worker was up is not run by the next one."""
    orders.stop_role("worker")
    task_id = orders.send(TYPE)
    wanted = Cancellation(task_id=UUID(task_id), type=TYPE, requested_at=datetime.now(UTC))
    message = control.outgoing("orders", wanted)
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        properties = pika.BasicProperties(headers=message.headers, **message.properties)
        connection.channel().basic_publish(message.exchange, message.routing_key, message.body, properties)
    assert ledger.outcome(task_id)["state"] == "cancelled"

    orders.start("worker")
    last = orders.send(TYPE)
    orders.release(last)
    assert ledger.outcome(last)["state"] == "succeeded"
    assert orders.starts(task_id) == 0
