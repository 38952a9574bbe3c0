"""Everything that email-worker does."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from email_worker.composing import Composer, invoice_mail, message_mail
from email_worker.delivering import Delivered, PostOffice
from email_worker.mailer import Mailer, SmtpServer
from email_worker.settings import EmailSettings
from taskmesh.contracts.billing import DocumentReady
from taskmesh.contracts.email import SendMessage
from taskmesh.objects import ObjectStore
from taskmesh.worker import MeshTask, WorkerApp

app = WorkerApp("email")

DELIVERY: dict[str, Any] = {
    # The number of attempts is no limit: a delivery ends by itself, after three days at the latest.
    "max_retries": None,
    # Only for what says no time of its own: the store is away, or another delivery holds the message.
    "retry_backoff_max": 60,
    # Above the longest conversation with a relay, and well below the half hour after which the broker takes back.
    "soft_time_limit": 1140,
    "time_limit": 1200,
    # Killed in the middle of a conversation, nobody would know whether the relay has the mail.
    "force_cancel": False,
}


@app.task(DocumentReady, transaction="last", **DELIVERY)
def mail_document(self: MeshTask, event: DocumentReady) -> Delivered:
    """Mail a billing document to its customer as soon as it is in the object store."""
    sender_name = self.app.settings.sender_name
    return office().deliver(self, lambda: invoice_mail(event, sender_name=sender_name))


@app.task(SendMessage, transaction="last", **DELIVERY)
def send_message(self: MeshTask, command: SendMessage) -> Delivered:
    """Send a mail that a caller wrote."""
    return office().deliver(self, lambda: message_mail(command))


_offices: list[PostOffice] = []


@app.on_process_start
def open_office(settings: EmailSettings) -> None:
    """Open the clients of this process; neither survives a fork."""
    server = SmtpServer.parse(settings.smtp_url.get_secret_value())
    _offices[:] = [
        PostOffice(
            composer=Composer(settings.sender, settings.mail_domain, ObjectStore.open(settings.object_store_url)),
            mailer=Mailer(
                server,
                hello_name=settings.mail_domain,
                answer_seconds=settings.smtp_answer_seconds,
                ca_file=settings.smtp_ca_file,
            ),
            resend_after=timedelta(seconds=settings.resend_after_seconds),
        )
    ]


def office() -> PostOffice:
    """The post office of this process."""
    return _offices[0]
