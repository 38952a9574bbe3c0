"""Mail addresses and the text that callers put into headers: what is let through, and what is refused."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from email_validator import EmailNotValidError, validate_email

from taskmesh.errors import PermanentError

# Python's own header classes decode such a word inside a value that is being *set*, and 3.11 then writes the CR and LF
# that it held: a Subject of `=?utf-8?q?x=0D=0ABcc=3A...?=` becomes a Bcc (CVE-2024-6923 and its kin).
ENCODED_WORD = re.compile(r"=\?.*\?=?", re.DOTALL)

LINE_BREAKING = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""C0 and C1 controls, lone surrogates, LINE SEPARATOR and PARAGRAPH SEPARATOR."""

OVERRIDES = frozenset("\u202d\u202e")
"""Bidirectional overrides make a text read as another one."""


class UnsafeHeader(PermanentError):
    """Text for a header could change the mail's structure, or how its header reads."""

    code: ClassVar[str] = "unsafe_header"


class BadAddress(PermanentError):
    """Mail cannot be sent to this address, whoever asks."""

    code: ClassVar[str] = "bad_address"


def is_header_safe(text: str) -> bool:
    """True if the text stays one header value, and reads as what it is."""
    return not ENCODED_WORD.search(text) and not any(
        unicodedata.category(character) in LINE_BREAKING or character in OVERRIDES for character in text
    )


def header_text(text: str, *, field: str) -> str:
    """The text, proven safe for a header.

    Raises:
        UnsafeHeader: It is not; the message names the field and not the text.
    """
    if not is_header_safe(text):
        raise UnsafeHeader(f"{field} holds control characters, bidirectional overrides or an encoded word")
    return text


def parse_address(address: str) -> str:
    """The address in the form that goes over the wire: an international domain becomes punycode.

    Raises:
        BadAddress: It is none, or its local part is not ASCII: not every server on the way takes such mail (RFC 6531).
    """
    try:
        # Not asking the DNS: whether a domain takes mail is the relay's to find out, and to wait for.
        found = validate_email(address, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError as error:
        # The validator's text quotes the address.
        raise BadAddress("the recipient's address is not valid") from error
    if found.ascii_email is None:
        raise BadAddress("an address with letters beyond ASCII before the @ cannot be mailed")
    return found.ascii_email
