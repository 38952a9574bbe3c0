"""Who waits at deploy time: `check` for `setup`, changing nothing, and `setup` for servers that are being started."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from taskmesh import logs
from taskmesh.database import is_migrated, is_unavailable, reason_of
from taskmesh.errors import TransientError
from taskmesh.settings import CheckSettings

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def check(settings: CheckSettings, *, service: str, scripts: Path | None) -> int:
    """Wait until the database has this release's schema; returns the exit code: 0 if it has, else 1.

    Args:
        settings: How long to wait.
        service: Of the logs.
        scripts: The service's Alembic folder, as for `taskmesh.database.migrate`.
    """
    logs.configure(settings.log_format, settings.log_level, service, "check")
    deadline = time.monotonic() + settings.check_wait_seconds
    said: str | None = None
    while (reason := _reason(settings, scripts)) is not None:
        if reason != said:
            logger.warning("schema is not there", extra={"reason": reason})
            said = reason
        if time.monotonic() >= deadline:
            return 1
        time.sleep(LOOK_SECONDS)
    logger.info("schema is there")
    return 0


def patiently(work: Callable[[], None], *, seconds: float) -> None:
    """Do what is safe to repeat, and repeat it while the database or the broker is away, for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except Exception as error:
            away = isinstance(error, TransientError) or is_unavailable(error)
            if not away or time.monotonic() >= deadline:
                raise
            logger.warning("setup waits", extra={"reason": reason_of(error)})
        time.sleep(LOOK_SECONDS)


def _reason(settings: CheckSettings, scripts: Path | None) -> str | None:
    try:
        return None if is_migrated(settings.database_url, scripts=scripts) else "setup has not run for this release"
    except SQLAlchemyError as error:
        return f"the database cannot be read: {reason_of(error)}"
