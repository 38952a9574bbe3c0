"""The service as it is deployed: its roles as processes, a real broker, and callers that use plain Celery."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest
from celery import Celery
from kombu import Exchange

from taskmesh.contracts.billing import DocumentReady
from taskmesh.objects import ObjectStore
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.parts.rabbitmq import create_vhost, delete_vhost, in_vhost
from taskmesh.testing.otlp import OtlpSink
from taskmesh.testing.smtp import SmtpSink
from taskmesh.testing.waiting import eventually


@dataclass
class Service:
    environment: dict[str, str]
    folder: Path
    database_url: str
    amqp_url: str
    smtp: SmtpSink
    otlp: OtlpSink
    processes: list[subprocess.Popen] = field(default_factory=list)

    def run(self, role: str) -> subprocess.Popen:
        log = (self.folder / f"{role}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "email_worker", role], env=self.environment, stdout=log, stderr=log
        )
        self.processes.append(process)
        return process

    def start(self, role: str) -> None:
        self.run(role)
        eventually((self.folder / f"email-{role}.ready").exists, explain=self.logs)

    def publish(self, name: str, exchange: str, task_id: str, payload: dict, **headers) -> None:
        with Celery(broker=self.amqp_url, set_as_current=False) as plain:
            plain.conf.task_create_missing_queues = False
            plain.send_task(
                name,
                kwargs=payload,
                task_id=task_id,
                exchange=Exchange(exchange, type="topic", no_declare=True),
                routing_key=name,
                headers=headers,
            )

    def one(self, statement: str, *values) -> tuple | None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(statement, values).fetchone()

    def logs(self) -> str:
        return "\n".join(path.read_text()[-6000:] for path in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def service(postgres, rabbitmq, tmp_path_factory):
    """One set of processes for all tests here; each test has tasks of its own."""
    folder = tmp_path_factory.mktemp("email")
    name = f"test_{uuid4().hex[:12]}"
    create_vhost(rabbitmq.management_url, name)
    database_url = create_database(postgres, name)
    amqp_url = in_vhost(rabbitmq.amqp_url, name)
    with SmtpSink() as smtp, OtlpSink() as otlp:
        environment = {
            **os.environ,
            "TASKMESH_DATABASE_URL": database_url,
            "TASKMESH_AMQP_URL": amqp_url,
            "TASKMESH_MANAGEMENT_URL": rabbitmq.management_url,
            "TASKMESH_HEALTH_DIR": str(folder),
            "TASKMESH_WORKER_CONCURRENCY": "2",
            "TASKMESH_OBJECT_STORE_URL": (folder / "objects").as_uri(),
            "TASKMESH_SMTP_URL": smtp.url,
            "TASKMESH_MAIL_DOMAIN": "mail.example.com",
            "TASKMESH_MAIL_FROM": "Example Ltd <billing@example.com>",
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        running = Service(environment, folder, database_url, amqp_url, smtp, otlp)
        try:
            assert running.run("setup").wait(60) == 0, running.logs()
            running.start("worker")
            yield running
        finally:
            for process in running.processes:
                process.terminate()
            for process in running.processes:
                process.wait(30)
            drop_database(postgres, name)
            delete_vhost(rabbitmq.management_url, name)


def test_an_event_and_a_command_become_mails_in_the_trace_of_their_caller(service, payload_factory):
    """What billing announces and what a caller asks for both arrive, each once, under one trace."""
    content = b"%PDF-1.7 not really"
    stored = ObjectStore.open((service.folder / "objects").as_uri()).put(content, "application/pdf")
    event_id, command_id = str(uuid4()), str(uuid4())
    event = payload_factory(
        DocumentReady,
        sha256=stored.sha256,
        size_bytes=stored.size_bytes,
        media_type="application/pdf",
        filename="請求書.pdf",
        invoice_number="2026-000123",
        total={"amount_minor": 1200000, "currency": "JPY"},
        recipient_name="株式会社サンプル",
        recipient_email="sample@example.jp",
        locale="ja",
    )
    command = {"to": {"address": "anna@example.org"}, "subject": "Hi", "text": "Hello."}
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    parent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}

    def publish_both():
        service.publish("billing.document.ready", "taskmesh.events", event_id, event, taskmesh_kind="event", **parent)
        service.publish("email.message.send", "taskmesh.commands", command_id, command, **parent)

    publish_both()
    listener_id = uuid5(UUID(event_id), "email")
    settled = "select count(*) = 2 from inbox where state = 'succeeded' and task_id in (%s, %s)"
    eventually(lambda: service.one(settled, listener_id, command_id)[0], explain=service.logs)
    publish_both()
    eventually(lambda: service.logs().count("delivery skipped") == 2, explain=service.logs)

    assert sorted(mail.rcpt_to[0] for mail in service.smtp.messages) == ["anna@example.org", "sample@example.jp"]
    mails = {mail.rcpt_to[0]: mail for mail in service.smtp.messages}
    invoice = mails["sample@example.jp"].message
    (attachment,) = invoice.iter_attachments()
    assert attachment.get_filename() == "請求書.pdf"
    assert attachment.get_content() == content
    assert "請求書 2026-000123" in invoice["Subject"]
    assert invoice["Message-ID"] == f"<{listener_id}.invoice@mail.example.com>"
    assert service.one("select count(*) from outbox where routing_key = 'email.message.accepted'") == (2,)
    spans = service.otlp.wait_for(
        2, timeout_seconds=10, where=lambda span: (span.name, span.trace_id) == ("smtp send", trace_id)
    )
    processing = service.otlp.wait_for(2, timeout_seconds=10, where=lambda span: span.name.startswith("process "))
    assert {span.parent_id for span in spans} <= {span.span_id for span in processing}
    assert all("@" not in str(value) for span in spans for value in span.attributes.values())


def test_a_refusal_fails_the_task_and_still_tells_its_event(service):
    """The ledger hears `hard_bounce`, and whoever listens hears that the message failed."""
    service.smtp.reply("RCPT", "550 5.1.1 unknown")
    task_id = str(uuid4())

    service.publish(
        "email.message.send",
        "taskmesh.commands",
        task_id,
        {"to": {"address": "gone@example.org"}, "subject": "Hi", "text": "Hello."},
    )
    eventually(
        lambda: service.one("select 1 from inbox where task_id = %s and state = 'failed'", task_id),
        explain=service.logs,
    )

    body = service.one("select body from outbox where routing_key = 'task.failed.email'")[0]
    assert b'"hard_bounce"' in bytes(body)
    event = service.one("select body from outbox where routing_key = 'email.message.failed'")[0]
    assert task_id.encode() in bytes(event)
    assert "gone@" not in service.logs()


def test_a_deferral_is_a_retry_that_waits_in_the_outbox(service):
    """The next attempt is a row with a due time, a minute away, for this service's own queue."""
    service.smtp.reply("RCPT", "450 4.2.1 busy")
    task_id = str(uuid4())

    service.publish(
        "email.message.send",
        "taskmesh.commands",
        task_id,
        {"to": {"address": "busy@example.org"}, "subject": "Hi", "text": "Hello."},
    )
    row = "select exchange, extract(epoch from due_at - now())::int from outbox where task_id = %s"
    exchange, wait_seconds = eventually(lambda: service.one(row, task_id), explain=service.logs)

    assert exchange == "taskmesh.direct"
    assert 45 <= wait_seconds <= 67
    assert service.one("select state from inbox where task_id = %s", task_id) == ("waiting",)
