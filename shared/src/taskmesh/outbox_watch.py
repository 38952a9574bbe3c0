"""A relay that is busy looks at the outbox by itself, and so need not be woken.

PostgreSQL lets transactions that notify commit one after the other, each with its own wait for the disk. So a busy
relay keeps watch: it says until when it looks again unasked, and the outbox's trigger notifies nobody before that time.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Final

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from taskmesh.outbox import outbox_watch

PAUSE_SECONDS: Final = 0.015
"""Rows gather so long after a batch: a transaction and its confirms cost as much for one row as for many."""

BUSY_PAUSE_SECONDS: Final = 0.03
"""The same of a relay that keeps watch: where there is no end of rows, their number counts more than their haste."""

WATCH_SECONDS: Final = 0.25
"""How long a watch lasts; it is renewed at half of it."""

MARGIN_SECONDS: Final = 0.1
"""A relay looks once more when its watch has been over for so long. A row whose transaction trusted in the watch and
took longer to commit waits for the relay's next poll."""

BUSY_BATCHES: Final = 3
"""After so many batches, each of which came right after the one before, a relay keeps watch."""

_UNTIL = func.clock_timestamp() + timedelta(seconds=WATCH_SECONDS)
# Of two relays the one that says so later looks later.
_KEEP = (
    insert(outbox_watch)
    .values(until=_UNTIL)
    .on_conflict_do_update(index_elements=[outbox_watch.c.is_one], set_={"until": _UNTIL})
)


class Watch:
    """Whether a relay has promised to look again, and until when."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._batches = 0
        self._until = 0.0

    async def note(self, *, rows: int) -> None:
        """Count a look at the outbox; keep watch for longer if there is no end of rows."""
        self._batches = self._batches + 1 if rows else 0
        if self._batches >= BUSY_BATCHES and self._until - time.monotonic() < WATCH_SECONDS / 2:
            async with self._engine.begin() as connection:
                await connection.execute(_KEEP)
            # By our own clock, and from after the statement: no earlier than the database's.
            self._until = time.monotonic() + WATCH_SECONDS

    @property
    def is_kept(self) -> bool:
        """True while somebody may still commit a row without a notification."""
        return time.monotonic() < self._until + MARGIN_SECONDS

    @property
    def pause_seconds(self) -> float:
        """How long rows gather after a batch."""
        return BUSY_PAUSE_SECONDS if self.is_kept else PAUSE_SECONDS

    def rest(self) -> None:
        """The next batch is the first of its kind: the relay has waited to be woken."""
        self._batches = 0
