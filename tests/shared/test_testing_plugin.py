"""The fixtures every service's tests build on."""

from __future__ import annotations

import smtplib
from email.message import EmailMessage

import httpx
import pika
import psycopg
import pytest

from taskmesh.contracts.billing import IssueInvoice, RenderDocument
from taskmesh.testing.smtp import HANG_UP


def _mail(subject: str = "Hello") -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "a@example.com", "b@example.com", subject
    mail.set_content("Text")
    return mail


def test_each_test_has_a_database_of_its_own(database_url, postgres):
    """A table made here is in no other database."""
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE mine (id int)")

    with psycopg.connect(postgres) as connection:
        assert connection.execute("SELECT to_regclass('mine')").fetchone() == (None,)


def test_the_runtime_role_of_a_service_reads_and_writes_but_does_not_change_tables(service_database):
    """Default privileges give the runtime role what the owner's migrations make, and nothing more."""
    urls = service_database("billing")
    with psycopg.connect(urls.owner_url) as owner:
        owner.execute("CREATE SCHEMA billing")
        owner.execute("CREATE TABLE billing.invoices (id int GENERATED ALWAYS AS IDENTITY, total int)")

    with psycopg.connect(urls.url) as user:
        user.execute("INSERT INTO billing.invoices (total) VALUES (1)")
        assert user.execute("SELECT total FROM billing.invoices").fetchone() == (1,)
        user.commit()
        for statement in (
            "ALTER TABLE billing.invoices ADD x int",
            "CREATE TABLE mine (id int)",
            "TRUNCATE billing.invoices",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                user.execute(statement)
            user.rollback()


def test_each_test_has_a_virtual_host_of_its_own(broker):
    """A queue declared here takes and gives back a message."""
    with pika.BlockingConnection(pika.URLParameters(broker.amqp_url)) as connection:
        channel = connection.channel()
        channel.queue_declare("q", durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        channel.basic_publish("", "q", b"hello", mandatory=True)

        _method, _properties, body = channel.basic_get("q", auto_ack=True)

    assert body == b"hello"
    assert httpx.get(f"{broker.management_url}/api/queues/{broker.vhost}/q").json()["type"] == "quorum"


def test_the_smtp_sink_keeps_a_mail_as_it_came(smtp_sink):
    """The envelope and the parsed message are both there."""
    with smtplib.SMTP("127.0.0.1", smtp_sink.port) as client:
        client.send_message(_mail("Grüße"))

    [mail] = smtp_sink.wait_for(1)
    assert (mail.mail_from, mail.rcpt_to, mail.subject) == ("a@example.com", ["b@example.com"], "Grüße")


def test_the_smtp_sink_answers_as_it_is_told(smtp_sink):
    """A scripted refusal holds for as many commands as asked for, then everything is accepted again."""
    smtp_sink.reply("RCPT", "450 4.2.1 mailbox busy")

    with smtplib.SMTP("127.0.0.1", smtp_sink.port) as client:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            client.send_message(_mail())
        client.send_message(_mail())

    assert refused.value.recipients["b@example.com"] == (450, b"4.2.1 mailbox busy")
    assert len(smtp_sink.messages) == 1


def test_the_smtp_sink_can_leave_the_sender_in_doubt(smtp_sink):
    """It hangs up after it has kept the mail, so the sender never learns."""
    smtp_sink.reply("DATA", HANG_UP)

    with smtplib.SMTP("127.0.0.1", smtp_sink.port) as client, pytest.raises(smtplib.SMTPServerDisconnected):
        client.send_message(_mail())

    assert len(smtp_sink.wait_for(1)) == 1


def test_the_smtp_sink_comes_back_on_the_same_port(smtp_sink):
    """A server that was down can be up again for the retry."""
    port = smtp_sink.port
    smtp_sink.stop()
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP("127.0.0.1", port)

    smtp_sink.start(port=port)

    with smtplib.SMTP("127.0.0.1", port) as client:
        client.send_message(_mail())
    assert len(smtp_sink.messages) == 1


def test_the_otlp_sink_receives_what_the_sdk_exports(otlp_sink):
    """Spans come with their parent, service, attributes and errors."""
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{otlp_sink.endpoint}/v1/traces", compression=Compression.Gzip)
    provider = TracerProvider(resource=Resource.create({"service.name": "gateway"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with pytest.raises(ZeroDivisionError), tracer.start_as_current_span("outer", attributes={"n": [1, 2]}):
        with tracer.start_as_current_span("inner"):
            pass
        _ = 1 / 0

    [outer] = otlp_sink.wait_for(1, name="outer")
    [inner] = otlp_sink.wait_for(1, name="inner")
    assert (inner.parent_id, inner.trace_id, inner.service) == (outer.span_id, outer.trace_id, "gateway")
    assert (outer.failed, inner.failed, outer.attributes["n"]) == (True, False, [1, 2])
    assert outer.events[0]["attributes"]["exception.type"] == "ZeroDivisionError"


def test_a_payload_fits_its_contract(payload_factory):
    """Given fields replace what the schema's example says, and the result is validated."""
    assert payload_factory(IssueInvoice, due_days=3)["due_days"] == 3
    assert set(payload_factory(RenderDocument)) == {"invoice_id"}


def test_a_payload_is_made_from_a_bare_schema(payload_factory):
    """Only required fields are there, each within its bounds."""
    schema = {
        "type": "object",
        "required": ["name", "count", "tags", "when"],
        "properties": {
            "name": {"type": "string", "minLength": 3, "pattern": "^[a-z]+$"},
            "count": {"type": "integer", "exclusiveMinimum": 4},
            "tags": {"type": "array", "minItems": 2, "items": {"enum": ["x", "y"]}},
            "when": {"type": "string", "format": "date"},
            "note": {"type": "string"},
        },
    }

    assert payload_factory(schema) == {"name": "abc", "count": 5, "tags": ["x", "x"], "when": "2026-01-31"}
