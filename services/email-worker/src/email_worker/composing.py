"""From a contract to a mail: who gets it, what it says, and which files come with it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from uuid import UUID

from email_worker import mime
from email_worker.addresses import header_text, is_header_safe, parse_address
from email_worker.messages import NewMessage
from email_worker.rendering import InvoiceFacts, render_invoice
from taskmesh.contracts.billing import DocumentReady
from taskmesh.contracts.email import SendMessage
from taskmesh.errors import NotFound, PermanentError
from taskmesh.objects import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReference:
    """A file in the object store that is to be attached."""

    sha256: str
    filename: str
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """A mail before it is bytes: attachments are references still."""

    template: str
    recipient: Address
    subject: str
    text: str
    html: str | None
    attachments: tuple[FileReference, ...]
    language: str | None = None


def invoice_mail(event: DocumentReady, *, sender_name: str) -> Mail:
    """The mail that brings a billing document to its customer.

    Raises:
        BadAddress: The customer's address cannot be mailed.
    """
    name = _one_line(event.recipient_name)
    filename = mime.safe_filename(event.filename)
    rendered = render_invoice(
        InvoiceFacts(
            number=_one_line(event.invoice_number),
            amount=event.total,
            due_on=event.due_on,
            recipient=name,
            sender=sender_name,
            filename=filename,
        ),
        event.locale,
    )
    # The name beside the address is decoration: an invoice is not withheld because of a strange one.
    display_name = name if is_header_safe(name) else ""
    return Mail(
        template="invoice",
        recipient=Address(display_name=display_name, addr_spec=parse_address(event.recipient_email)),
        subject=rendered.subject,
        text=rendered.text,
        html=rendered.html,
        attachments=(FileReference(sha256=event.sha256, filename=filename, media_type=event.media_type),),
        language=rendered.language,
    )


def message_mail(command: SendMessage) -> Mail:
    """The mail that a caller wrote.

    Raises:
        BadAddress: The recipient cannot be mailed.
        UnsafeHeader: The recipient's name or the subject would not stay in its header.
    """
    name = _one_line(header_text(command.to.name or "", field="the recipient's name"))
    return Mail(
        template="message",
        recipient=Address(display_name=name, addr_spec=parse_address(command.to.address)),
        subject=_one_line(header_text(command.subject, field="subject")),
        text=command.text,
        html=command.html or None,
        attachments=tuple(
            FileReference(sha256=file.sha256, filename=file.filename, media_type=file.media_type)
            for file in command.attachments
        ),
    )


@dataclass(frozen=True, slots=True)
class Composer:
    """Turns mails into stored messages, in the name of one sender."""

    sender: Address
    domain: str
    objects: ObjectStore

    def compose(self, mail: Mail, *, message_id: UUID, created_at: datetime) -> NewMessage:
        """Fetch the attachments and write the MIME.

        Raises:
            ObjectStoreUnavailable: The store is away; worth another try.
            PermanentError: This mail cannot be sent, now or later.
        """
        heading = mime.Heading(
            message_id=message_id,
            template=mail.template,
            domain=self.domain,
            created_at=created_at,
            sender=self.sender,
            recipient=mail.recipient,
            subject=mail.subject,
            language=mail.language,
        )
        files = [self._fetch(attachment) for attachment in mail.attachments]
        return NewMessage(
            id=message_id,
            template=mail.template,
            to_address=mail.recipient.addr_spec,
            header_id=heading.header_id,
            created_at=created_at,
            mime=mime.build(heading, text=mail.text, html=mail.html, files=files),
        )

    def _fetch(self, attachment: FileReference) -> mime.File:
        try:
            content = self.objects.get(attachment.sha256)
        except NotFound as error:
            raise PermanentError(f"attachment {attachment.sha256} is not in the object store") from error
        return mime.File(filename=attachment.filename, media_type=attachment.media_type, content=content)


def _one_line(text: str) -> str:
    """The text with single spaces: header parsers do not agree on more, nor on those at the ends."""
    return " ".join(text.split())
