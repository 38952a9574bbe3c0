"""A connection that listens for PostgreSQL's notifications, and sleeps until there is one."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen

Result = TypeVar("Result")

SLEEP_SECONDS: Final = 30.0


class ListeningConnection(psycopg.AsyncConnection[Any]):
    """psycopg's own, which looks around ten times a second while it waits: half of what an idle role would cost."""

    async def wait(self, gen: PQGen[Result], interval: float = SLEEP_SECONDS, timeout: float | None = None) -> Result:  # noqa: ASYNC109 - psycopg's signature
        """Wait for the server's next word, as psycopg does."""
        return await super().wait(gen, interval, timeout)
