"""Health files: what a probe reads without starting a second copy of the application.

`<service>-<role>.ready` exists while the role can do its work; `<service>-<role>.alive` is touched by the role's own
loop, so its age tells whether that loop still turns. Neither depends on the broker or the database being there.
"""

from __future__ import annotations

import time
from pathlib import Path


class Health:
    """The two files of one role; does nothing when no directory is configured."""

    def __init__(self, directory: Path | None, name: str) -> None:
        self._ready = directory / f"{name}.ready" if directory else None
        self._alive = directory / f"{name}.alive" if directory else None
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            self.stopped()

    def ready(self) -> None:
        """Say that the role can work from now on."""
        if self._ready:
            self._ready.touch()
        self.beat()

    def beat(self) -> None:
        """Say that the role's loop has just turned."""
        if self._alive:
            self._alive.touch()

    def stopped(self) -> None:
        """Say that the role does not work (yet, or any more)."""
        for path in (self._ready, self._alive):
            if path:
                path.unlink(missing_ok=True)


def is_alive(directory: Path, name: str, *, max_age_seconds: float = 30.0) -> bool:
    """True if the role is ready and its loop has turned within `max_age_seconds`."""
    alive = directory / f"{name}.alive"
    try:
        age_seconds = time.time() - alive.stat().st_mtime
    except FileNotFoundError:
        return False
    return age_seconds <= max_age_seconds and (directory / f"{name}.ready").exists()
