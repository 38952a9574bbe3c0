"""The SMTP conversation, with a real server."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
import trustme

from email_worker.mailer import Envelope, Security, SmtpServer
from email_worker.replies import Outcome, Stage
from taskmesh.testing.smtp import SmtpSink

ENVELOPE = Envelope(sender="billing@example.com", recipient="anna@example.org")
MIME = b"Subject: x\r\n\r\nhello\r\n"


def ready() -> None:
    """Nothing to commit before the content is sent."""


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def tls(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_starttls_encrypts_and_logs_in(tls, ca_file, new_mailer):
    with SmtpSink(tls=tls, credentials=("mesh", "p@ss/word")) as sink:
        mailer = new_mailer(f"smtp+starttls://mesh:p%40ss%2Fword@127.0.0.1:{sink.port}", ca_file=ca_file)

        reply = mailer.send(ENVELOPE, MIME, before_data=ready)
        mailer.close()

    assert reply.outcome is Outcome.ACCEPTED
    assert len(sink.messages) == 1


def test_a_wrong_password_defers_as_our_own_fault(tls, ca_file, new_mailer):
    with SmtpSink(tls=tls, credentials=("mesh", "right")) as sink:
        mailer = new_mailer(f"smtp+starttls://mesh:wrong@127.0.0.1:{sink.port}", ca_file=ca_file)

        reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert (reply.outcome, reply.code, reply.is_our_configuration) == (Outcome.DEFERRED, 535, True)
    assert sink.messages == []


def test_an_unknown_certificate_is_not_trusted(tls, new_mailer):
    with SmtpSink(tls=tls) as sink:
        mailer = new_mailer(f"smtp+starttls://127.0.0.1:{sink.port}")

        reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert (reply.outcome, reply.stage, reply.text) == (Outcome.DEFERRED, Stage.SESSION, "SSLCertVerificationError")
    assert sink.messages == []


def test_required_starttls_never_falls_back_to_clear_text(smtp_sink, new_mailer):
    mailer = new_mailer(f"smtp+starttls://127.0.0.1:{smtp_sink.port}")

    reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert reply.outcome is Outcome.DEFERRED
    assert smtp_sink.messages == []


def test_a_connection_is_used_again(smtp_sink, new_mailer):
    mailer = new_mailer()
    mailer.send(ENVELOPE, MIME, before_data=ready)
    smtp_sink.reply("EHLO", "421 4.3.2 nobody new", times=5)

    replies = [mailer.send(ENVELOPE, MIME, before_data=ready) for _ in range(3)]

    assert {reply.outcome for reply in replies} == {Outcome.ACCEPTED}
    assert len(smtp_sink.messages) == 4


def test_a_connection_is_used_again_after_a_refusal(smtp_sink, new_mailer):
    mailer = new_mailer()
    smtp_sink.reply("RCPT", "550 5.1.1 unknown")
    mailer.send(ENVELOPE, MIME, before_data=ready)
    smtp_sink.reply("EHLO", "421 4.3.2 nobody new", times=5)

    reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert reply.outcome is Outcome.ACCEPTED


def test_a_connection_that_died_while_idle_is_replaced(smtp_sink, new_mailer):
    mailer = new_mailer()
    mailer.send(ENVELOPE, MIME, before_data=ready)
    for connection in mailer._idle:
        connection.smtp.sock.shutdown(2)

    reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert reply.outcome is Outcome.ACCEPTED


def test_what_goes_wrong_before_the_content_ends_the_conversation(smtp_sink, new_mailer):
    def database_is_away():
        raise RuntimeError("no database")

    with pytest.raises(RuntimeError):
        new_mailer().send(ENVELOPE, MIME, before_data=database_is_away)

    assert smtp_sink.messages == []


@pytest.fixture
def silent_server() -> Iterator[tuple[int, list[bytes]]]:
    """Takes one mail, and says nothing when it is complete."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as lines:
                connection.sendall(b"220 silent.test\r\n")
                for line in lines:
                    verb = line[:4].upper()
                    connection.sendall(b"354 go on\r\n" if verb == b"DATA" else b"250 ok\r\n")
                    if verb == b"DATA":
                        break
                received.extend(iter(lines.readline, b".\r\n"))
                connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1], received
        thread.join(10)


def test_a_server_that_never_answers_leaves_the_mail_in_doubt(silent_server, new_mailer):
    port, received = silent_server
    mailer = new_mailer(f"smtp://127.0.0.1:{port}", answer_seconds=0.2)

    reply = mailer.send(ENVELOPE, MIME, before_data=ready)

    assert (reply.outcome, reply.stage, reply.code) == (Outcome.AMBIGUOUS, Stage.ANSWER, None)
    assert b"".join(received) == MIME


@pytest.mark.parametrize(
    ("url", "security", "port"),
    [
        ("smtp://relay.test", Security.PLAIN, 25),
        ("smtp+starttls://user:secret@relay.test", Security.STARTTLS, 587),
        ("smtps://relay.test:2465", Security.IMPLICIT_TLS, 2465),
    ],
)
def test_an_smtp_url_says_how_to_connect(url, security, port):
    server = SmtpServer.parse(url)

    assert (server.host, server.security, server.port) == ("relay.test", security, port)
    assert "secret" not in repr(server)


@pytest.mark.parametrize("url", ["http://relay.test", "smtp://", "relay.test:25", "smtp://user:secret@relay.test"])
def test_a_wrong_smtp_url_is_refused_without_being_quoted(url):
    with pytest.raises(ValueError, match="smtp") as error:
        SmtpServer.parse(url)

    assert "secret" not in str(error.value)
