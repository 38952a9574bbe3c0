"""What the email service understands and what it tells."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from taskmesh.contracts._base import Command, Event, Part
from taskmesh.contracts.billing import EmailAddress, Sha256


class Recipient(Part):
    address: EmailAddress
    name: Annotated[str, StringConstraints(max_length=200)] | None = None


class Attachment(Part):
    """A file in the object store; the bytes never travel in a message."""

    sha256: Sha256
    filename: Annotated[str, StringConstraints(min_length=1, max_length=120)]
    media_type: Annotated[str, StringConstraints(pattern=r"^[a-z]+/[a-z0-9.+-]+$", max_length=100)]


class SendMessage(Command, type="email.message.send"):
    """Send one mail to one recipient: at least once, and always with the same Message-ID."""

    to: Recipient
    subject: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    text: Annotated[str, StringConstraints(min_length=1, max_length=50_000)]
    html: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    attachments: Annotated[tuple[Attachment, ...], Field(max_length=5)] = ()


class MessageAccepted(Event, type="email.message.accepted"):
    """The mail relay has taken the message."""

    message_id: UUID


class MessageFailed(Event, type="email.message.failed"):
    """The message was refused for good, or given up; `reason` is a class such as `hard_bounce` or `ambiguous`."""

    message_id: UUID
    reason: str
