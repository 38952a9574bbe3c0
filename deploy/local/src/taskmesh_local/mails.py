"""The mails that the inbox page has received."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import cached_property
from pathlib import Path
from typing import Any

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
            "from": self.header("From"),
            "to": self.header("To"),
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
        with self._open() as database:
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
        with self._open() as database:
            columns = "received_at, mail_from, rcpt_to, recipients, subject, content"
            database.execute(f"INSERT INTO mails ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - a constant

    def get(self, number: int) -> Mail | None:
        with self._open() as database:
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
        with self._open() as database:
            return [_mail(row) for row in database.execute(f"{SELECT} {where}", values).fetchall()]

    def count(self) -> int:
        with self._open() as database:
            return int(database.execute("SELECT count(*) FROM mails").fetchone()[0])

    def clear(self) -> None:
        with self._open() as database:
            database.execute("DELETE FROM mails")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection per use: cheap for a local file, and free of questions about threads.
        database = sqlite3.connect(self._path, timeout=10)
        try:
            with database:
                yield database
        finally:
            database.close()


SELECT = "SELECT id, received_at, mail_from, rcpt_to, content FROM mails"


def _mail(row: tuple[Any, ...]) -> Mail:
    number, received_at, mail_from, rcpt_to, content = row
    return Mail(number, received_at, mail_from, json.loads(rcpt_to), content)


def _bytes(part: EmailMessage) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else part.as_bytes()
