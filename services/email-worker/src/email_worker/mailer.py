"""SMTP: the one module that talks to the mail relay.

A mail leaves in `Mailer.send`: MAIL, one RCPT, DATA, the content, and the wait for the reply that says who is
responsible for the mail from then on.
"""

from __future__ import annotations

import re
import smtplib
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opentelemetry.trace import SpanKind, Status, StatusCode

from email_worker.replies import Outcome, Reply, Stage
from taskmesh import telemetry
from taskmesh.metrics import catalogue

CONNECT_SECONDS = 10.0
COMMAND_SECONDS = 60.0
CONTENT_SECONDS = 180.0
"""For the content as a whole: what RFC 5321 4.5.3.2.5 allows for each block of it."""

MAILS_PER_CONNECTION = 100
IDLE_SECONDS = 60.0

LEADING_DOT = re.compile(rb"^\.", re.MULTILINE)


class Security(StrEnum):
    """How the connection is encrypted; never a fallback from one to another."""

    PLAIN = "smtp"
    STARTTLS = "smtp+starttls"
    IMPLICIT_TLS = "smtps"


DEFAULT_PORTS = {Security.PLAIN: 25, Security.STARTTLS: 587, Security.IMPLICIT_TLS: 465}


@dataclass(frozen=True, slots=True)
class SmtpServer:
    """Where the relay is, and how to talk to it."""

    host: str
    port: int
    security: Security
    username: str | None = None
    password: str | None = None

    @classmethod
    def parse(cls, url: str) -> SmtpServer:
        """Read `smtp://host:port`, `smtp+starttls://user:password@host` or `smtps://...`.

        Raises:
            ValueError: It is none of these; the message does not quote the URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in set(Security) or not parts.hostname:
            raise ValueError("an SMTP URL reads smtp://, smtp+starttls:// or smtps://, then user:password@host:port")
        security = Security(parts.scheme)
        if parts.username and security is Security.PLAIN:
            raise ValueError("credentials are sent over smtp+starttls:// or smtps:// only")
        return cls(
            host=parts.hostname,
            port=parts.port or DEFAULT_PORTS[security],
            security=security,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )

    def __repr__(self) -> str:
        return f"SmtpServer({self.security}://{self.host}:{self.port})"


@dataclass(frozen=True, slots=True)
class Envelope:
    """Whom the relay is told; one recipient, because a reply to two cannot be told apart."""

    sender: str
    recipient: str


@dataclass(slots=True)
class _Connection:
    smtp: smtplib.SMTP
    mails: int = 0
    idle_since: float = 0.0


class Mailer:
    """Sends mails through one relay, and keeps its connections open in between.

    Safe to share between threads: each mail in flight has a connection of its own. Not safe across a fork.
    """

    def __init__(
        self, server: SmtpServer, *, hello_name: str, answer_seconds: float = 600.0, ca_file: Path | None = None
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            server: The relay.
            hello_name: What we call ourselves in EHLO.
            answer_seconds: How long to wait for the reply to the final dot; RFC 5321 4.5.3.2.6 asks for ten minutes,
                because giving up earlier makes duplicates. Commands and content are given no more than that either.
            ca_file: Certificates to trust in place of the system's.
        """
        self.server = server
        self._hello_name = hello_name
        self._answer_seconds = answer_seconds
        self._command_seconds = min(COMMAND_SECONDS, answer_seconds)
        self._content_seconds = min(CONTENT_SECONDS, answer_seconds)
        self._tls = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        self._idle: deque[_Connection] = deque()

    @property
    def data_seconds(self) -> float:
        """The longest time from `before_data` to the relay's last word."""
        return self._command_seconds + self._content_seconds + self._answer_seconds

    def send(self, envelope: Envelope, mime: bytes, *, before_data: Callable[[], None]) -> Reply:
        """Offer one mail to the relay and return its last word.

        Args:
            envelope: From whom, to whom.
            mime: The message with CRLF line ends, 7 bit.
            before_data: Called when the relay has agreed to take the mail, right before its content is sent. What it
                raises ends the conversation without sending.
        """
        attributes: dict[str, str | int] = {"server.address": self.server.host, "server.port": self.server.port}
        with telemetry.tracer().start_as_current_span("smtp send", kind=SpanKind.CLIENT, attributes=attributes) as span:
            reply = self._offer(envelope, mime, before_data)
            span.set_attribute("taskmesh.smtp.reply_class", reply.code_class)
            span.set_attribute("taskmesh.smtp.stage", reply.stage.value)
            span.set_attribute("taskmesh.smtp.outcome", reply.outcome.value)
            catalogue.SMTP_REPLIES.add(
                reply_class=reply.code_class, stage=reply.stage.value, outcome=reply.outcome.value
            )
            if reply.outcome is not Outcome.ACCEPTED:
                span.set_status(Status(StatusCode.ERROR, str(reply)))
            return reply

    def close(self) -> None:
        """Say goodbye on every idle connection."""
        while self._idle:
            _quit(self._idle.popleft().smtp)

    def _offer(self, envelope: Envelope, mime: bytes, before_data: Callable[[], None]) -> Reply:
        try:
            connection = self._take() or self._connect()
        except (OSError, smtplib.SMTPException) as error:
            return _reply_of(error, Stage.SESSION)
        try:
            reply = self._converse(connection.smtp, envelope, mime, before_data)
        except BaseException:
            connection.smtp.close()
            raise
        self._give_back(connection, reply)
        return reply

    def _converse(self, smtp: smtplib.SMTP, envelope: Envelope, mime: bytes, before_data: Callable[[], None]) -> Reply:
        stage = Stage.MAIL
        try:
            options = [f"size={len(mime)}"] if smtp.has_extn("size") else []
            code, text = smtp.mail(envelope.sender, options)
            if code != 250:
                return _reply(stage, code, text)
            stage = Stage.RCPT
            code, text = smtp.rcpt(envelope.recipient)
            if code not in {250, 251}:
                return _reply(stage, code, text)
        except (OSError, smtplib.SMTPException) as error:
            return _reply_of(error, stage)
        # Outside the try: an error of the database is no error of the relay.
        before_data()
        stage = Stage.DATA
        try:
            code, text = smtp.docmd("DATA")
            if code != 354:
                return _reply(stage, code, text)
            _wait_at_most(smtp, self._content_seconds)
            # If this fails, some byte before the dot was never handed over, so the relay cannot have a whole mail.
            smtp.send(_transparent(mime))
            stage = Stage.ANSWER
            _wait_at_most(smtp, self._answer_seconds)
            code, text = smtp.getreply()
            _wait_at_most(smtp, self._command_seconds)
        except (OSError, smtplib.SMTPException) as error:
            return _reply_of(error, stage)
        return _reply(stage, code, text)

    def _take(self) -> _Connection | None:
        """An idle connection that still answers."""
        while True:
            try:
                # The youngest first, so that the others can grow old enough to be closed.
                connection = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - connection.idle_since < IDLE_SECONDS:
                try:
                    if connection.smtp.noop()[0] == 250:
                        return connection
                except (OSError, smtplib.SMTPException):
                    pass
            connection.smtp.close()

    def _give_back(self, connection: _Connection, reply: Reply) -> None:
        connection.mails += 1
        lost = reply.code is None or reply.code == 421
        if lost or connection.mails >= MAILS_PER_CONNECTION or not _is_reset(connection.smtp, reply):
            _quit(connection.smtp)
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def _connect(self) -> _Connection:
        server = self.server
        if server.security is Security.IMPLICIT_TLS:
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(
                server.host, server.port, local_hostname=self._hello_name, timeout=CONNECT_SECONDS, context=self._tls
            )
        else:
            smtp = smtplib.SMTP(server.host, server.port, local_hostname=self._hello_name, timeout=CONNECT_SECONDS)
        try:
            _wait_at_most(smtp, self._command_seconds)
            smtp.ehlo_or_helo_if_needed()
            if server.security is Security.STARTTLS:
                smtp.starttls(context=self._tls)
                smtp.ehlo_or_helo_if_needed()
            if server.username is not None:
                smtp.login(server.username, server.password or "")
        except BaseException:
            smtp.close()
            raise
        return _Connection(smtp)


def _wait_at_most(smtp: smtplib.SMTP, seconds: float) -> None:
    if smtp.sock is not None:
        smtp.sock.settimeout(seconds)


def _transparent(mime: bytes) -> bytes:
    """Double leading dots and add the final one (RFC 5321 4.5.2)."""
    end = b"" if mime.endswith(b"\r\n") else b"\r\n"
    return LEADING_DOT.sub(b"..", mime) + end + b".\r\n"


def _is_reset(smtp: smtplib.SMTP, reply: Reply) -> bool:
    """After a refusal, clear what the server remembers of the mail; True if the connection can go on."""
    if reply.outcome is Outcome.ACCEPTED:
        return True
    try:
        return smtp.rset()[0] == 250
    except (OSError, smtplib.SMTPException):
        return False


def _quit(smtp: smtplib.SMTP) -> None:
    try:
        _wait_at_most(smtp, 1.0)
        smtp.quit()
    except (OSError, smtplib.SMTPException):
        smtp.close()


def _reply(stage: Stage, code: int, text: bytes) -> Reply:
    # smtplib says -1 for a line that is no reply.
    return Reply(stage, code if code > 0 else None, text.decode("utf-8", "replace"))


def _reply_of(error: OSError | smtplib.SMTPException, stage: Stage) -> Reply:
    if isinstance(error, smtplib.SMTPResponseException) and error.smtp_code > 0:
        text = error.smtp_error
        return Reply(stage, error.smtp_code, text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
    # No reply: only the kind of error is kept, because its text may name hosts and people.
    return Reply(stage, None, type(error).__name__)
