"""Whether somebody wants the running task cancelled."""

from __future__ import annotations

import time
from uuid import UUID

import psycopg
from pydantic import SecretStr

LOOK_SECONDS = 0.5

# The task is not to wait for a database that is away: it will learn that in its own time.
OPTIONS = {"connect_timeout": 2, "tcp_user_timeout": 2000, "application_name": "taskmesh-cancel-watch"}


class CancelWatch:
    """Looks for the cancellation of one task, at most twice a second and outside its transaction.

    Args:
        url: Of the service's database. A connection is opened for each look: a pool's may all be in the task's hands.
        task_id: The task.
    """

    def __init__(self, url: SecretStr, task_id: UUID) -> None:
        self._url = url
        self._task_id = task_id
        self._looked_at = float("-inf")
        self._cancelled = False

    def is_cancelled(self) -> bool:
        """True once a cancellation has arrived; False also while the database is away."""
        if not self._cancelled and time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._cancelled = self._look()
            self._looked_at = time.monotonic()
        return self._cancelled

    def _look(self) -> bool:
        try:
            with psycopg.connect(self._url.get_secret_value(), autocommit=True, **OPTIONS) as connection:  # type: ignore[arg-type]
                statement = "select 1 from cancellations where task_id = %s"
                return connection.execute(statement, (self._task_id,)).fetchone() is not None
        except psycopg.Error:
            return False
