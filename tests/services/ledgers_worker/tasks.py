"""What the service does, well and badly."""

from __future__ import annotations

import smtplib
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any, ClassVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from celery.signals import task_prerun
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session

from taskmesh.contracts import Command, Event
from taskmesh.errors import PermanentError
from taskmesh.settings import WorkerSettings
from taskmesh.worker import MeshTask, WorkerApp

app = WorkerApp("ledgers")


class LedgerSettings(WorkerSettings):
    smtp_url: SecretStr
    house: str


class AccountUnknown(PermanentError):
    """There is no such account."""

    code: ClassVar[str] = "account_unknown"


class EntryUnknown(PermanentError):
    """There is no such entry."""

    code: ClassVar[str] = "entry_unknown"


class PostEntry(Command, type="ledgers.entry.post"):
    """Posts in the transaction that the runtime commits."""

    account: str
    amount_minor: int


class PrintReceipt(Command, type="ledgers.receipt.print"):
    """Needs an entry that another task has posted."""

    entry_id: UUID


class EntryPosted(Event, type="ledgers.entry.posted"):
    """An entry was posted."""

    account: str


class ClaimEntry(Command, type="ledgers.entry.claim"):
    """Commits a step that the task's id makes safe to repeat."""

    account: str


class AppendEntry(Command, type="ledgers.entry.append"):
    """Commits a step that counts anew in each run."""

    account: str


class MailNotice(Command, type="ledgers.notice.mail"):
    """Sends a mail in each run, and remembers nothing."""

    account: str


class CloseAccount(Command, type="ledgers.account.close"):
    """Knows one account only."""

    account: str


class CountVisit(Command, type="ledgers.visit.count"):
    """Counts where the inbox does not see it: in a hook of Celery's, which every delivery runs through."""


def insert(session: Session, task_id: UUID, account: str) -> UUID:
    entry_id = uuid4()
    session.execute(
        text("insert into entries (id, task_id, account, posted_at) values (:id, :task_id, :account, :at)"),
        {"id": entry_id, "task_id": task_id, "account": account, "at": datetime.now(UTC)},
    )
    return entry_id


@app.task(PostEntry)
def post(self: MeshTask, command: PostEntry) -> None:
    entry_id = insert(self.session, self.task_id, command.account)
    self.emit(EntryPosted(account=command.account))
    self.send(PrintReceipt(entry_id=entry_id))


@app.task(EntryPosted)
def on_posted(self: MeshTask, event: EntryPosted) -> None:
    insert(self.session, self.task_id, f"heard of {event.account}")


@app.task(PrintReceipt)
def print_receipt(self: MeshTask, command: PrintReceipt) -> None:
    known = self.session.execute(text("select account from entries where id = :id"), {"id": command.entry_id})
    if known.one_or_none() is None:
        raise EntryUnknown("no such entry")
    insert(self.session, self.task_id, "receipt")


@app.task(ClaimEntry, transaction="last")
def claim(self: MeshTask, command: ClaimEntry) -> None:
    with self.transaction() as session:
        session.execute(
            text("insert into claims (task_id, account) values (:id, :account) on conflict do nothing"),
            {"id": self.task_id, "account": command.account},
        )


@app.task(AppendEntry, transaction="last")
def append(self: MeshTask, command: AppendEntry) -> None:
    with self.transaction() as session:
        insert(session, self.task_id, command.account)


@app.task(MailNotice, transaction="last")
def mail_notice(self: MeshTask, command: MailNotice) -> None:
    server = urlsplit(self.app.settings.smtp_url.get_secret_value())
    notice = EmailMessage()
    notice["From"], notice["To"], notice["Subject"] = "ledgers@example.com", "you@example.com", command.account
    with smtplib.SMTP(server.hostname or "", server.port or 25) as relay:
        relay.send_message(notice)


@app.task(CloseAccount)
def close(self: MeshTask, command: CloseAccount) -> None:
    if command.account != "4711":
        raise AccountUnknown("only 4711 can be closed")
    insert(self.session, self.task_id, f"closed {command.account}")


@app.task(CountVisit)
def count_visit(self: MeshTask, command: CountVisit) -> None:
    """Leaves the work to the hook."""


@task_prerun.connect(sender=count_visit)
def note_visit(task: MeshTask, task_id: str, **_: Any) -> None:
    with task.app._engine_of_process().begin() as connection:
        connection.execute(text("insert into entries (id, account) values (:id, 'visit')"), {"id": uuid4()})
