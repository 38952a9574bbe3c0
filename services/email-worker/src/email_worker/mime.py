"""MIME: one mail as bytes, the same bytes for the same input.

Attempts of one message send identical bytes under one Message-ID, so signatures hold and receivers that remove
duplicates can. Nothing here is random or reads a clock.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage, MIMEPart
from email.parser import BytesParser
from email.utils import format_datetime
from typing import ClassVar, cast
from uuid import UUID

from email_worker.addresses import UnsafeHeader, header_text
from taskmesh.errors import PermanentError

ATTACHMENT_MAX_BYTES = 7 * 1024 * 1024
MAIL_MAX_BYTES = 10 * 1024 * 1024
HTML_MAX_BYTES = 100_000  # Gmail shows no more than 102 KB of a mail.

MEDIA_TYPES = frozenset(
    {
        "application/json",
        "application/pdf",
        "application/xml",
        "image/jpeg",
        "image/png",
        "text/csv",
        "text/plain",
        "text/xml",
    }
)
"""What may be attached: files that open nothing but a viewer, and no `message/*` or `multipart/*`."""

FILENAME_MAX_LENGTH = 100

WIRE = policy.SMTP.clone(max_line_length=78)


class MailTooBig(PermanentError):
    """The mail is larger than what most servers take."""

    code: ClassVar[str] = "too_big"


class MediaTypeRefused(PermanentError):
    """Files of this type are not mailed."""

    code: ClassVar[str] = "media_type_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An attachment with its bytes."""

    filename: str
    media_type: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """The facts in the header of a mail."""

    message_id: UUID
    template: str
    domain: str
    created_at: datetime
    sender: Address
    recipient: Address
    subject: str
    language: str | None = None

    @property
    def header_id(self) -> str:
        """The Message-ID: whoever finds it in a mailbox or a bounce can find the message's row."""
        return f"<{self.message_id}.{self.template}@{self.domain}>"


def build(heading: Heading, *, text: str, html: str | None, files: Sequence[File]) -> bytes:
    """The mail as it goes over the wire: CRLF, 7 bit.

    Raises:
        UnsafeHeader: Some header text would not come out as it went in.
        MailTooBig: The HTML part, a file, or the whole mail is too large.
        MediaTypeRefused: A file is of a type that is not mailed.
    """
    _check_sizes(html, files)
    mail = EmailMessage(policy=WIRE)
    mail["From"] = heading.sender
    mail["To"] = heading.recipient
    mail["Subject"] = header_text(heading.subject, field="subject")
    mail["Date"] = format_datetime(heading.created_at.replace(microsecond=0))
    mail["Message-ID"] = heading.header_id
    mail["MIME-Version"] = "1.0"
    # Tells out-of-office programs to keep quiet (RFC 3834).
    mail["Auto-Submitted"] = "auto-generated"
    if heading.language:
        mail["Content-Language"] = heading.language
    _fill(mail, heading.message_id, text, html, files)
    wire = mail.as_bytes()
    if len(wire) > MAIL_MAX_BYTES:
        raise MailTooBig(f"mail of {len(wire)} bytes is larger than the limit of {MAIL_MAX_BYTES}")
    _verify(wire, mail, heading)
    return wire


def safe_filename(name: str) -> str:
    """The name with nothing that a file system or a mail program could take for more than a name.

    Letters and digits of every script stay; the extension stays when the name is cut.
    """
    composed = unicodedata.normalize("NFC", name)
    plain = "".join(_filename_character(character) for character in composed)
    plain = re.sub(r"_{2,}", "_", plain).strip(" ._")
    if len(plain) > FILENAME_MAX_LENGTH:
        stem, dot, extension = plain.rpartition(".")
        if dot and len(extension) <= 10:
            plain = stem[: FILENAME_MAX_LENGTH - len(extension) - 1].rstrip(" ._") + dot + extension
        else:
            plain = plain[:FILENAME_MAX_LENGTH]
    return plain or "attachment"


def _filename_character(character: str) -> str:
    # Marks are kept: Arabic, Thai and the scripts of India cannot be written without them.
    if unicodedata.category(character)[0] in "LNM" or character in " ._-()":
        return character
    return "_"


def _check_sizes(html: str | None, files: Sequence[File]) -> None:
    if html is not None and len(html.encode()) > HTML_MAX_BYTES:
        raise MailTooBig(f"the HTML part is larger than {HTML_MAX_BYTES} bytes")
    for file in files:
        if len(file.content) > ATTACHMENT_MAX_BYTES:
            raise MailTooBig(f"attachment of {len(file.content)} bytes is larger than {ATTACHMENT_MAX_BYTES}")
        if file.media_type not in MEDIA_TYPES:
            raise MediaTypeRefused(f"files of type {file.media_type} are not mailed")


def _fill(mail: EmailMessage, message_id: UUID, text: str, html: str | None, files: Sequence[File]) -> None:
    """Put the parts together: mixed(alternative(text, html), files...), and no more nesting than is needed."""
    if not files:
        _fill_body(mail, message_id, text, html)
        return
    mail.make_mixed(_boundary(message_id, "mixed"))
    body = _part()
    _fill_body(body, message_id, text, html)
    mail.attach(body)
    for file in files:
        mail.attach(_attachment(file))


def _fill_body(part: EmailMessage, message_id: UUID, text: str, html: str | None) -> None:
    if html is None:
        _set_text(part, text, "plain")
        return
    part.make_alternative(_boundary(message_id, "alternative"))
    for content, subtype in ((text, "plain"), (html, "html")):
        alternative = _part()
        _set_text(alternative, content, subtype)
        part.attach(alternative)


def _set_text(part: EmailMessage, content: str, subtype: str) -> None:
    # Either encoding keeps a caller's text from holding a boundary line: `=_` cannot occur in it.
    is_mostly_ascii = sum(character < "\x80" for character in content) * 4 >= len(content) * 3
    part.set_content(content, subtype=subtype, charset="utf-8", cte="quoted-printable" if is_mostly_ascii else "base64")


def _attachment(file: File) -> EmailMessage:
    part = _part()
    maintype, subtype = file.media_type.split("/")
    filename = safe_filename(file.filename)
    # Bytes in, base64 out, whatever the type: a text file must arrive with its own line ends.
    part.set_content(file.content, maintype=maintype, subtype=subtype, filename=filename, cte="base64")
    return part


def _part() -> EmailMessage:
    # An EmailMessage would add a MIME-Version, which only the whole mail has; typeshed takes nothing else in `attach`.
    return cast("EmailMessage", MIMEPart(policy=WIRE))


def _boundary(message_id: UUID, name: str) -> str:
    return f"=_{message_id.hex}_{name}"


def _verify(wire: bytes, mail: EmailMessage, heading: Heading) -> None:
    """Read the mail back as a receiver does, and compare: the last guard against header injection.

    Raises:
        UnsafeHeader: A header appeared, vanished or changed on the way.
    """
    seen = BytesParser(policy=policy.default).parsebytes(wire, headersonly=True)
    same = (
        seen.keys() == mail.keys()
        and str(seen["Subject"]) == heading.subject
        and _mailboxes(seen["From"].addresses) == _mailboxes([heading.sender])
        and _mailboxes(seen["To"].addresses) == _mailboxes([heading.recipient])
        and str(seen["Message-ID"]).strip() == heading.header_id
    )
    if not same:
        raise UnsafeHeader("the mail's header does not read back as it was written")


def _mailboxes(addresses: Sequence[Address]) -> list[tuple[str, str]]:
    return [(address.display_name, address.addr_spec) for address in addresses]
