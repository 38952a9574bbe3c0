"""The whole service: setup, relay and a prefork worker as processes, against a real broker and a real database."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import psycopg
import pytest
from celery import Celery

from taskmesh.contracts.billing import DocumentReady, IssueInvoice
from taskmesh.objects import ObjectStore
from taskmesh.parts.postgres import ServiceDatabase, create_service_database, drop_service_database
from taskmesh.parts.rabbitmq import create_vhost, delete_vhost, in_vhost
from taskmesh.testing.waiting import eventually


@dataclass
class Billing:
    """The running service, seen from outside."""

    database_url: str
    amqp_url: str
    folder: Path

    @property
    def objects(self) -> Path:
        return self.folder / "objects"

    def send(self, name: str, payload: dict[str, Any], task_id: str | None = None) -> str:
        """Publish as plain Celery does."""
        with Celery(broker=self.amqp_url, set_as_current=False) as plain:
            plain.conf.task_create_missing_queues = False
            result = plain.send_task(
                name, kwargs=payload, task_id=task_id or str(uuid4()), exchange="taskmesh.commands", routing_key=name
            )
            return str(result.id)

    def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(statement, parameters).fetchall()

    def state(self, task_id: str) -> str | None:
        rows = self.rows("select state from inbox where task_id = %s", task_id)
        return rows[0][0] if rows else None

    def wait(self, task_id: str, *states: str) -> str:
        wanted = states or ("succeeded", "failed")
        return str(eventually(lambda: (state := self.state(task_id)) in wanted and state))

    def take(self, queue: str) -> list[tuple[str, Any]]:
        """What waits in a queue, as routing key and body."""
        connection = pika.BlockingConnection(pika.URLParameters(self.amqp_url))
        channel = connection.channel()
        found: list[tuple[str, Any]] = []
        while True:
            method, _, body = channel.basic_get(queue, auto_ack=True)
            if method is None or body is None:
                connection.close()
                return found
            found.append((str(method.routing_key), json.loads(body)))


@pytest.fixture(scope="module")
def billing(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Billing]:
    """Setup with the owner's rights, then relay and worker with their own; one for all tests here, as it takes seconds."""
    name = f"billing_{secrets.token_hex(6)}"
    create_vhost(rabbitmq.management_url, name)
    database = create_service_database(postgres, name)
    folder = tmp_path_factory.mktemp("billing")
    try:
        with _running(database, in_vhost(rabbitmq.amqp_url, name), rabbitmq.management_url, folder) as service:
            yield service
    finally:
        drop_service_database(postgres, name)
        delete_vhost(rabbitmq.management_url, name)


@contextmanager
def _running(database: ServiceDatabase, amqp_url: str, management_url: str, folder: Path) -> Iterator[Billing]:
    environment = {
        **os.environ,
        "TASKMESH_AMQP_URL": amqp_url,
        "TASKMESH_MANAGEMENT_URL": management_url,
        "TASKMESH_HEALTH_DIR": str(folder),
        "TASKMESH_RELAY_POLL_SECONDS": "0.2",
        "TASKMESH_SOFT_SHUTDOWN_SECONDS": "2",
        "TASKMESH_OBJECT_STORE_URL": (folder / "objects").as_uri(),
        "TASKMESH_SELLER_NAME": "Taskmesh Demo GmbH",
        "TASKMESH_SELLER_ADDRESS": "Lindenstraße 7|10969 Berlin",
        "TASKMESH_SELLER_VAT_ID": "DE123456789",
        "TASKMESH_SELLER_IBAN": "DE89 3704 0044 0532 0130 00",
    }
    environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    service = Billing(database.url, amqp_url, folder)

    def run(role: str, url: str) -> subprocess.Popen[bytes]:
        with (folder / f"{role}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "billing_worker", role],
                env={**environment, "TASKMESH_DATABASE_URL": url},
                stdout=log,
                stderr=log,
            )

    assert run("setup", database.owner_url).wait(60) == 0, (folder / "setup.log").read_text()
    _listen(amqp_url)
    processes = [run("relay", database.url), run("worker", database.url)]
    try:
        for role in ("relay", "worker"):
            eventually((folder / f"billing-{role}.ready").exists)
        yield service
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listen(amqp_url: str) -> None:
    """What the gateway would declare, and a queue of a listener's."""
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    channel = connection.channel()
    for queue, exchange, key in (
        ("events", "taskmesh.events", "billing.#"),
        ("gateway.lifecycle", "taskmesh.lifecycle", "#"),
        ("gateway.dead-letters", "taskmesh.dead", "#"),
    ):
        channel.queue_declare(queue)
        channel.queue_bind(queue, exchange, key)
    connection.close()


def test_an_invoice_is_issued_rendered_and_told_once_whatever_is_repeated(
    billing: Billing, command: Callable[..., IssueInvoice]
) -> None:
    payload = command(idempotency_key="order-1").payload()

    # The same message twice, the same wish as another task, and other content under the same key.
    task_id = billing.send("billing.invoice.issue", payload)
    billing.wait(task_id)
    billing.send("billing.invoice.issue", payload, task_id)
    again = billing.send("billing.invoice.issue", payload)
    other = billing.send("billing.invoice.issue", {**payload, "due_days": 30})
    assert [billing.wait(again), billing.wait(other)] == ["succeeded", "failed"]
    ((invoice_id, number),) = billing.rows("select id, number from invoices where idempotency_key = 'order-1'")
    eventually(lambda: billing.rows("select 1 from documents where invoice_id = %s", invoice_id))
    renders = [billing.send("billing.document.render", {"invoice_id": str(invoice_id)}) for _ in range(3)]
    assert {billing.wait(render) for render in renders} == {"succeeded"}

    eventually(lambda: not billing.rows("select 1 from outbox"))
    events = [(key, body[1]) for key, body in billing.take("events") if body[1]["invoice_id"] == str(invoice_id)]
    assert [key for key, _ in events] == ["billing.invoice.issued", "billing.document.ready"]
    ready = DocumentReady.model_validate(events[1][1])
    assert (ready.invoice_number, ready.filename) == (number, f"{number}.pdf")
    assert (ready.recipient_email, ready.locale) == ("rechnung@nordwind.example", "de-DE")
    content = ObjectStore.open(billing.objects.as_uri()).get(ready.sha256)
    assert content.startswith(b"%PDF-")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (ready.size_bytes, ready.sha256)
    assert billing.rows("select sum(total_minor) from invoices") == billing.rows(
        "select sum(amount_minor) from ledger_entries where account = 'receivable'"
    )


def test_a_document_waits_for_an_object_store_that_is_away(
    billing: Billing, command: Callable[..., IssueInvoice]
) -> None:
    # Nobody can make a folder under a file.
    shutil.rmtree(billing.objects, ignore_errors=True)
    billing.objects.write_text("in the way")

    issued = billing.send("billing.invoice.issue", command().payload())
    billing.wait(issued)
    eventually(lambda: billing.rows("select 1 from inbox where state = 'waiting'"))
    billing.objects.unlink()
    billing.objects.mkdir()

    eventually(
        lambda: billing.rows(
            "select 1 from documents join invoices on invoice_id = invoices.id where idempotency_key = %s", issued
        )
    )
    eventually(lambda: not billing.rows("select 1 from inbox where state = 'waiting'"))


def test_what_will_never_work_fails_and_what_breaks_the_contract_is_parked(
    billing: Billing, command: Callable[..., IssueInvoice]
) -> None:
    negative = command(lines=[{"description": "x", "unit_price": "-1", "tax": {"rate": "19"}}]).payload()
    broken = {**command().payload(), "currency": "EUX"}

    failed = billing.send("billing.invoice.issue", negative)
    unknown = billing.send("billing.document.render", {"invoice_id": str(uuid4())})
    parked = billing.send("billing.invoice.issue", broken)

    assert billing.wait(failed) == "failed"
    assert billing.wait(unknown) == "failed"
    eventually(lambda: billing.take("gateway.dead-letters"))
    eventually(lambda: not billing.rows("select 1 from outbox"))
    told = {
        event["task_id"]: event["failure"]["code"]
        for key, batch in billing.take("gateway.lifecycle")
        if key.startswith("task.failed")
        for event in batch
    }
    assert (told[failed], told[unknown], told[parked]) == ("total_negative", "invoice_unknown", "contract_violation")
    assert billing.rows("select count(*) from invoices where idempotency_key in (%s, %s)", failed, parked) == [(0,)]
