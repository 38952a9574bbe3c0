"""A real SMTP server for tests: keeps what it accepts, and can be told to refuse, to stall and to hang up."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from types import TracebackType
from typing import Any, Self, TypeVar

from aiosmtpd.smtp import SMTP, Envelope, Session

T = TypeVar("T")
HANG_UP = "hang up"
"""A scripted reply: close the connection without a word. After DATA the sender cannot know if the mail was taken."""


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """One accepted mail, as it came over the wire."""

    mail_from: str
    rcpt_to: list[str]
    content: bytes
    message: EmailMessage = field(repr=False)

    @property
    def subject(self) -> str:
        return str(self.message["Subject"])

    @property
    def message_id(self) -> str:
        return str(self.message["Message-ID"])


class SmtpSink:
    """Receives mail on a free port of 127.0.0.1 until it is left.

    Args:
        tls: With a context the server offers STARTTLS.
        credentials: With a user and a password the server demands AUTH.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, credentials: tuple[str, str] | None = None) -> None:
        self._tls = tls
        self._credentials = credentials
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="smtp-sink", daemon=True)
        self._arrived = threading.Condition()
        self._script: dict[str, deque[str]] = {}
        self._server: asyncio.Server | None = None
        self.messages: list[ReceivedMail] = []
        """Every accepted mail, in order of arrival; of one DATA with several recipients, one."""
        self.port = 0

    @property
    def url(self) -> str:
        """`smtp://127.0.0.1:<port>`, in the form of TASKMESH_SMTP_URL."""
        return f"smtp://127.0.0.1:{self.port}"

    def reply(self, command: str, answer: str, *, times: int = 1) -> None:
        """Answer the next `times` of a command with `answer`: `reply("RCPT", "450 4.2.1 mailbox busy")`.

        Commands: EHLO, MAIL, RCPT, DATA (after the whole mail has come). `HANG_UP` closes the connection; with DATA the
        mail is kept first, so the sender is left in doubt about a mail that did arrive. A 2xx answer accepts.
        """
        self._script.setdefault(command.upper(), deque()).extend([answer] * times)

    def wait_for(self, count: int = 1, timeout_seconds: float = 10) -> list[ReceivedMail]:
        """Return the messages as soon as there are `count`.

        Raises:
            TimeoutError: There are fewer after the time.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.messages) >= count, timeout_seconds):
                raise TimeoutError(f"{len(self.messages)} of {count} mails arrived within {timeout_seconds} s")
            return list(self.messages)

    def start(self, *, port: int = 0) -> None:
        """Listen, on a free port if none is given; after `stop` the same port may be given again."""
        if not self._thread.is_alive():
            self._thread.start()
        self._server = self._run(self._loop.create_server(self._protocol, "127.0.0.1", port))
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Stop listening, as a server that is down."""
        if self._server:
            self._loop.call_soon_threadsafe(self._server.close)
            self._run(self._server.wait_closed() if not self._server.is_serving() else asyncio.sleep(0))
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _protocol(self) -> SMTP:
        return SMTP(
            _Handler(self),
            hostname="sink.test",
            enable_SMTPUTF8=True,
            tls_context=self._tls,
            require_starttls=self._tls is not None,
            auth_required=self._credentials is not None,
            auth_require_tls=False,
            authenticator=self._authenticate if self._credentials else None,
            loop=self._loop,
        )

    def _authenticate(self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any) -> Any:
        from aiosmtpd.smtp import AuthResult

        expected = tuple(part.encode() for part in self._credentials or ())
        # Not handled: aiosmtpd is to send the 235 or 535.
        return AuthResult(success=(data.login, data.password) == expected, handled=False)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def next_reply(self, command: str) -> str | None:
        """The scripted answer to this command, used up by asking."""
        script = self._script.get(command)
        return script.popleft() if script else None

    def keep(self, envelope: Envelope) -> None:
        """Add an accepted mail and wake whoever waits for it."""
        content = envelope.original_content or b""
        message = message_from_bytes(content, policy=policy.default)
        mail = ReceivedMail(envelope.mail_from or "", list(envelope.rcpt_tos), content, message)
        with self._arrived:
            self.messages.append(mail)
            self._arrived.notify_all()


class _Handler:
    """aiosmtpd calls `handle_<COMMAND>` in the loop's thread."""

    def __init__(self, sink: SmtpSink) -> None:
        self._sink = sink

    async def handle_EHLO(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, _envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        answer = self._scripted(server, "EHLO")
        return [answer] if answer else responses

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        answer = self._scripted(server, "MAIL") or "250 2.1.0 OK"
        if answer.startswith("2"):
            envelope.mail_from = address
            envelope.mail_options.extend(options)
        return answer

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        answer = self._scripted(server, "RCPT") or "250 2.1.5 OK"
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
            envelope.rcpt_options.extend(options)
        return answer

    async def handle_DATA(self, server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        answer = self._sink.next_reply("DATA") or "250 2.0.0 OK: queued"
        if answer == HANG_UP:
            self._sink.keep(envelope)
            return _hang_up(server)
        if answer.startswith("2"):
            self._sink.keep(envelope)
        return answer

    def _scripted(self, server: SMTP, command: str) -> str | None:
        answer = self._sink.next_reply(command)
        return _hang_up(server) if answer == HANG_UP else answer


def _hang_up(server: SMTP) -> str:
    if isinstance(server.transport, asyncio.WriteTransport):
        server.transport.abort()
    return "421 4.3.2 never sent"
