"""The mails that the inbox page has received."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import getaddresses, quote
from functools import cached_property
from pathlib import Path
from typing import Any

from taskmesh_local.sqlite import opened

SCHEMA = """
CREATE TABLE IF NOT EXISTS mails (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    mail_from TEXT NOT NULL,
    rcpt_to TEXT NOT NULL,
    recipients TEXT NOT NULL,
    subject TEXT NOT NULL,
    content BLOB NOT NULL
)
"""


@dataclass(frozen=True)
class Attachment:
    name: str
    media_type: str
    content: bytes

    def summary(self) -> dict[str, Any]:
        return {"name": self.name, "media_type": self.media_type, "size_bytes": len(self.content)}


@dataclass(frozen=True)
class Mail:
    """One received mail."""

    id: int
    received_at: str
    mail_from: str
    rcpt_to: list[str]
    content: bytes

    @cached_property
    def message(self) -> EmailMessage:
        return message_from_bytes(self.content, policy=policy.default)

    @cached_property
    def attachments(self) -> list[Attachment]:
        return [
            Attachment(part.get_filename() or f"part-{number}", part.get_content_type(), _bytes(part))
            for number, part in enumerate(self.message.iter_attachments())
            if isinstance(part, EmailMessage)
        ]

    def header(self, name: str) -> str:
        """A header as a person reads it; empty if there is none."""
        return str(self.message.get(name, ""))

    def mailboxes(self, name: str) -> str:
        """A header of addresses, with the names as they were meant.

        The parser of `policy.default` puts a blank between two encoded words of one name.
        """
        written = [_text(value) for key, value in self.message.raw_items() if key.lower() == name.lower()]
        read = [_mailbox(person, address) for person, address in getaddresses(written) if address]
        return ", ".join(read) or self.header(name)

    def body(self, kind: str) -> str | None:
        """The `plain` or the `html` part."""
        part = self.message.get_body((kind,))
        return str(part.get_content()) if part is not None else None

    def summary(self) -> dict[str, Any]:
        """What the list shows."""
        return {
            "id": self.id,
            "received_at": self.received_at,
            "mail_from": self.mail_from,
            "rcpt_to": self.rcpt_to,
            "from": self.mailboxes("From"),
            "to": self.mailboxes("To"),
            "subject": self.header("Subject"),
            "message_id": self.header("Message-ID"),
            "size_bytes": len(self.content),
            "attachments": [attachment.summary() for attachment in self.attachments],
        }

    def details(self) -> dict[str, Any]:
        """The summary, the bodies and every header."""
        headers = [[name, str(value)] for name, value in self.message.items()]
        return self.summary() | {"text": self.body("plain"), "html": self.body("html"), "headers": headers}


class Mails:
    """A file of mails that survives the page being killed: a mail is on disk before its sender hears 250."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with opened(self._path) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(SCHEMA)

    def add(self, mail_from: str, rcpt_to: Sequence[str], content: bytes) -> None:
        """Keep a mail."""
        message = message_from_bytes(content, policy=policy.default)
        row = (
            datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            mail_from,
            json.dumps(list(rcpt_to)),
            f"{' '.join(rcpt_to)} {message.get('To', '')}",
            str(message.get("Subject", "")),
            content,
        )
        with opened(self._path) as database:
            columns = "received_at, mail_from, rcpt_to, recipients, subject, content"
            database.execute(f"INSERT INTO mails ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - a constant

    def get(self, number: int) -> Mail | None:
        with opened(self._path) as database:
            row = database.execute(f"{SELECT} WHERE id = ?", (number,)).fetchone()
        return _mail(row) if row else None

    def find(self, *, limit: int, before: int | None = None, to: str = "", subject: str = "") -> list[Mail]:
        """The newest mails first, those with `to` among the recipients and `subject` in the subject."""
        # The blanks are there because instr finds an empty text nowhere in an empty one.
        where = """
            WHERE (:before IS NULL OR id < :before)
              AND instr(' ' || lower(recipients), lower(:to)) > 0
              AND instr(' ' || lower(subject), lower(:subject)) > 0
            ORDER BY id DESC LIMIT :limit
        """
        values = {"before": before, "to": to, "subject": subject, "limit": limit}
        with opened(self._path) as database:
            return [_mail(row) for row in database.execute(f"{SELECT} {where}", values).fetchall()]

    def count(self) -> int:
        with opened(self._path) as database:
            return int(database.execute("SELECT count(*) FROM mails").fetchone()[0])

    def clear(self) -> None:
        with opened(self._path) as database:
            database.execute("DELETE FROM mails")


SELECT = "SELECT id, received_at, mail_from, rcpt_to, content FROM mails"


def _mail(row: tuple[Any, ...]) -> Mail:
    number, received_at, mail_from, rcpt_to, content = row
    return Mail(number, received_at, mail_from, json.loads(rcpt_to), content)


def _text(header: str) -> str:
    """A header as it came, with bytes beyond ASCII read as the UTF-8 that RFC 6532 allows."""
    return header.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _mailbox(name: str, address: str) -> str:
    # A person can still see what a name says that cannot be decoded.
    with contextlib.suppress(HeaderParseError, LookupError, UnicodeError):
        name = str(make_header(decode_header(name)))
    if not name:
        return address
    return f'"{quote(name)}" <{address}>' if set(name) & set('()<>@,:;.[]"\\') else f"{name} <{address}>"


def _bytes(part: EmailMessage) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else part.as_bytes()
