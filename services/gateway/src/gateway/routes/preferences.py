"""The `Prefer` header (RFC 7240): how long an answer may be held until there is more to say."""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import Header

MAX_WAIT_SECONDS: Final = 60

Prefer = Annotated[
    str | None,
    Header(description=f"`wait=N` holds the answer for up to N (at most {MAX_WAIT_SECONDS}) seconds (RFC 7240)."),
]


def wait_seconds(prefer: str | None) -> int:
    """The seconds of a `wait` preference, at most 60; 0 without one. Preferences that cannot be read are ignored."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", prefer or "", re.IGNORECASE)
    return min(int(found[1]), MAX_WAIT_SECONDS) if found else 0
