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
from email.header import Header, decode_header, make_header
from email.headerregistry import Address
from email.message import EmailMessage, MIMEPart
from email.parser import BytesParser
from email.utils import format_datetime, getaddresses, quote
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
        UnsafeHeader: Some header text is not fit for a header, or would not come out as it went in.
        MailTooBig: The HTML part, a file, or the whole mail is too large.
        MediaTypeRefused: A file is of a type that is not mailed.
    """
    _check_sizes(html, files)
    fields = _fields(heading)
    body = _part()
    _fill(body, heading.message_id, text, html, files)
    # Written by hand: the library's header classes decode what they are given, and fold names in two.
    wire = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("ascii") + body.as_bytes()
    if len(wire) > MAIL_MAX_BYTES:
        raise MailTooBig(f"mail of {len(wire)} bytes is larger than the limit of {MAIL_MAX_BYTES}")
    _verify(wire, [*fields, *body.keys()], heading)
    return wire


def _fields(heading: Heading) -> dict[str, str]:
    fields = {
        "From": _mailbox(heading.sender),
        "To": _mailbox(heading.recipient),
        "Subject": _unstructured(header_text(heading.subject, field="subject")),
        "Date": format_datetime(heading.created_at.replace(microsecond=0)),
        "Message-ID": heading.header_id,
        # Tells out-of-office programs to keep quiet (RFC 3834).
        "Auto-Submitted": "auto-generated",
        "MIME-Version": "1.0",
    }
    if heading.language:
        fields["Content-Language"] = heading.language
    return fields


def _unstructured(text: str) -> str:
    """Header text: as it is in ASCII, else as encoded words, each of them whole characters (RFC 2047)."""
    return text if text.isascii() else Header(text, "utf-8", header_name="Subject").encode(linesep="\r\n")


def _mailbox(address: Address) -> str:
    name = header_text(address.display_name, field="a display name")
    if not name:
        return address.addr_spec
    phrase = f'"{quote(name)}"' if name.isascii() else _unstructured(name)
    return f"{phrase} <{address.addr_spec}>"


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


def _verify(wire: bytes, names: list[str], heading: Heading) -> None:
    """Read the mail back as a receiver does, and compare: the last guard against header injection.

    Raises:
        UnsafeHeader: A header appeared, vanished or changed on the way.
    """
    seen = BytesParser(policy=policy.compat32).parsebytes(wire, headersonly=True)
    same = (
        seen.keys() == names
        and _decoded(seen["Subject"]) == heading.subject
        and _mailboxes(seen["From"]) == [(heading.sender.display_name, heading.sender.addr_spec)]
        and _mailboxes(seen["To"]) == [(heading.recipient.display_name, heading.recipient.addr_spec)]
        and seen["Message-ID"] == heading.header_id
    )
    if not same:
        raise UnsafeHeader("the mail's header does not read back as it was written")


def _mailboxes(field: str) -> list[tuple[str, str]]:
    # Split first, decode then: a decoded name may hold commas. The newer parser puts a space between encoded words.
    return [(_decoded(name), address) for name, address in getaddresses([field])]


def _decoded(text: str) -> str:
    return str(make_header(decode_header(text)))
