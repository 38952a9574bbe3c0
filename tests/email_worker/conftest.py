"""A post office with a real database, a real SMTP server and a real object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from email.headerregistry import Address
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import email_worker
from email_worker.composing import Composer, Mail, message_mail
from email_worker.delivering import Delivered, PostOffice
from email_worker.mailer import Mailer, SmtpServer
from taskmesh import celery_protocol, outbox
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts import Event
from taskmesh.contracts.email import SendMessage
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.database import migrate, sync_engine
from taskmesh.errors import TaskCancelled
from taskmesh.objects import ObjectStore

MIGRATIONS = Path(email_worker.__file__).parent / "migrations"
SENDER = Address("Example Ltd", "billing", "example.com")


@dataclass
class Caller:
    """One delivery of one task, without the broker: what a `MeshTask` gives to a delivery."""

    engine: Engine
    task_id: UUID = field(default_factory=uuid4)
    cancelled_at_look: int | None = None
    """Which look of the delivery finds that nobody wants the mail; None finds that never."""

    def raise_if_cancelled(self) -> None:
        if self.cancelled_at_look is not None:
            self.cancelled_at_look -= 1
            if self.cancelled_at_look <= 0:
                raise TaskCancelled("cancelled while it ran")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with Session(self.engine) as session, session.begin():
            yield session

    def emit(self, event: Event, *, session: Session | None = None) -> UUID:
        assert session is not None
        message = TaskMessage(type=event.type_name, id=uuid4(), payload=event.payload(), kind=TaskKind.EVENT)
        outbox.put(session.connection(), [celery_protocol.event(message)])
        return message.id


@dataclass
class Desk:
    """What the tests of deliveries do and see."""

    engine: Engine
    office: PostOffice
    objects: ObjectStore

    def deliver(self, task_id: UUID, mail: Mail | None = None, *, cancelled_at_look: int | None = None) -> Delivered:
        """One delivery of the task."""
        return self.office.deliver(Caller(self.engine, task_id, cancelled_at_look), lambda: mail or self.mail())

    @staticmethod
    def mail(**fields: Any) -> Mail:
        """A mail as a caller may ask for it."""
        defaults: dict[str, Any] = {
            "to": {"address": "anna@example.org", "name": "Anna"},
            "subject": "Hi",
            "text": "Hello.",
        }
        return message_mail(SendMessage.model_validate(defaults | fields))

    def rest(self, task_id: UUID) -> None:
        """Let the time pass until the message may be tried again."""
        self.execute("update messages set not_before = now() - interval '1 second' where id = :id", id=task_id)

    def row(self, task_id: UUID) -> Any:
        return self.execute("select * from messages where id = :id", id=task_id).one()

    def events(self) -> list[str]:
        """The events that wait to be published, in order, with the reason of a failure."""
        rows = self.execute("select routing_key, body from outbox order by id").all()
        names = []
        for key, body in rows:
            message = celery_protocol.decode(*_minimal(key, bytes(body)))
            names.append(" ".join([key.rpartition(".")[2], message.payload.get("reason", "")]).strip())
        return names

    def execute(self, statement: str, **values: Any) -> Any:
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return result.freeze()() if result.returns_rows else result


def _minimal(key: str, body: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    return {"task": key, "id": str(uuid4())}, {"content_type": "application/json"}, body


@pytest.fixture
def engine(database_url) -> Iterator[Engine]:
    migrate(database_url, scripts=MIGRATIONS)
    engine = sync_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def new_mailer(smtp_sink) -> Iterator[Callable[..., Mailer]]:
    """Call it for a mailer; of the sink, unless another URL is given."""
    mailers: list[Mailer] = []

    def create(url: str = smtp_sink.url, **options: Any) -> Mailer:
        options = {"hello_name": "mail.example.com", "answer_seconds": 5, **options}
        mailers.append(Mailer(SmtpServer.parse(url), **options))
        return mailers[-1]

    yield create
    for mailer in mailers:
        mailer.close()


@pytest.fixture
def desk(engine, new_mailer, tmp_path) -> Desk:
    objects = ObjectStore.open(tmp_path.as_uri())
    composer = Composer(SENDER, "mail.example.com", objects)
    office = PostOffice(composer=composer, mailer=new_mailer(), resend_after=timedelta(minutes=10))
    return Desk(engine, office, objects)
