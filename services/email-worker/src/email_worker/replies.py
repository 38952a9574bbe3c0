"""What an SMTP server's reply means for a message: accepted, later, never, or nobody knows.

Reply codes: RFC 5321 section 4.2; enhanced status codes: RFC 3463. Every decision about a reply is taken here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cached_property


class Stage(StrEnum):
    """How far the conversation had come when the reply arrived, or failed to."""

    SESSION = "session"
    """Connecting, greeting, TLS, authentication: nothing about this message yet."""
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    """From the DATA command to the last byte but the final dot: the server cannot have taken the message."""
    ANSWER = "answer"
    """The whole message is out; the server may have taken it even if its reply never comes."""


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    DEFERRED = "deferred"
    """Not now: try again later."""
    HARD_BOUNCE = "hard_bounce"
    """The mailbox does not exist; mailing it again would hurt the sender's reputation."""
    SENDER_REFUSED = "sender_refused"
    """Our fault: policy, reputation or authentication of the sender. The recipient is not to blame."""
    TOO_BIG = "too_big"
    CONTENT_REFUSED = "content_refused"
    REFUSED = "refused"
    """For good, for a reason that is none of the others."""
    AMBIGUOUS = "ambiguous"
    """The server may or may not have taken the message (RFC 1047)."""


ENHANCED = re.compile(r"^([245])\.(\d{1,3})\.(\d{1,3})\b")

MAILBOX_GONE = frozenset({(1, 1), (1, 2), (1, 3), (1, 6), (1, 10), (2, 1)})
MAILBOX_FULL = (2, 2)
MESSAGE_TOO_BIG = (3, 4)
SENDER_ADDRESS_BAD = frozenset({(1, 7), (1, 8)})
POLICY = 7
CONTENT = 6

AUTHENTICATION_CODES = frozenset({530, 534, 535, 538})
"""TLS or authentication is missing or wrong: our configuration, which a person mends while the mail waits."""

WAIT_HINT = re.compile(r"\bin (\d{1,5}) ?(second|minute|hour)s?\b", re.IGNORECASE)
LONGEST_HINT = timedelta(hours=24)


@dataclass(frozen=True)
class Reply:
    """The server's last word about one message; `code` is None when the connection ended without one."""

    stage: Stage
    code: int | None
    text: str = ""

    @property
    def status(self) -> str | None:
        """The enhanced status code, such as `5.1.1`."""
        found = ENHANCED.match(self.text)
        return found.group() if found else None

    @property
    def code_class(self) -> str:
        """`2xx`, `4xx`, `5xx`, or `none`; few enough values to count by."""
        return f"{self.code // 100}xx" if self.code else "none"

    @property
    def is_our_configuration(self) -> bool:
        """True if a person has to mend credentials, TLS or the server's address before any mail can leave."""
        return self.code in AUTHENTICATION_CODES or (self.stage is Stage.SESSION and self.code_class == "5xx")

    @property
    def wait_hint(self) -> timedelta | None:
        """How long the server asks to wait, when its text says so ("try again in 5 minutes")."""
        found = WAIT_HINT.search(self.text)
        if not found:
            return None
        count, unit = int(found.group(1)), found.group(2).lower()
        return min(timedelta(**{f"{unit}s": count}), LONGEST_HINT)

    @cached_property
    def outcome(self) -> Outcome:
        """What becomes of the message."""
        match self.code_class:
            case "2xx":
                return Outcome.ACCEPTED
            case "5xx":
                return self._permanent()
            case "none" if self.stage is Stage.ANSWER:
                return Outcome.AMBIGUOUS
            case _:
                return Outcome.DEFERRED

    def _permanent(self) -> Outcome:
        if self.is_our_configuration:
            return Outcome.DEFERRED
        found = ENHANCED.match(self.text)
        if found and found.group(1) == "5":
            outcome = _by_detail(int(found.group(2)), int(found.group(3)))
            if outcome:
                return outcome
        return self._by_stage(has_status=found is not None)

    def _by_stage(self, *, has_status: bool) -> Outcome:
        match self.stage:
            case Stage.MAIL | Stage.ANSWER if self.code == 552:
                return Outcome.TOO_BIG
            case Stage.MAIL:
                return Outcome.SENDER_REFUSED
            case Stage.RCPT if not has_status and self.code in {550, 551, 553}:
                return Outcome.HARD_BOUNCE
            case Stage.DATA | Stage.ANSWER:
                return Outcome.CONTENT_REFUSED
            case _:
                return Outcome.REFUSED

    def __str__(self) -> str:
        """Code, status and stage; never the server's text, which likes to quote the address."""
        parts = [str(self.code or "no reply"), self.status, f"at {self.stage}"]
        return " ".join(part for part in parts if part)


def _by_detail(subject: int, detail: int) -> Outcome | None:
    if (subject, detail) in MAILBOX_GONE:
        return Outcome.HARD_BOUNCE
    if (subject, detail) == MAILBOX_FULL:
        return Outcome.DEFERRED
    if (subject, detail) == MESSAGE_TOO_BIG:
        return Outcome.TOO_BIG
    if (subject, detail) in SENDER_ADDRESS_BAD or subject == POLICY:
        return Outcome.SENDER_REFUSED
    if subject == CONTENT:
        return Outcome.CONTENT_REFUSED
    return None
