"""Health files: what a probe reads without starting a second copy of the application.

`<service>-<role>.ready` exists while the role can do its work; `<service>-<role>.alive` is touched by the role's own
loop, so its age tells whether that loop still turns. A role whose broker or database is away is alive: it waits, and a
restart would help nobody.

    python -m taskmesh.health alive|ready FOLDER/<service>-<role> [SECONDS]

is a probe: exit code 0 for yes, 1 for no with the reason on standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

MAX_AGE_SECONDS = 60.0
"""A loop that has not turned for so long does not turn. No single wait of any role lasts half as long."""

USAGE = "usage: python -m taskmesh.health alive|ready FOLDER/SERVICE-ROLE [SECONDS]"


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

    def unready(self) -> None:
        """Say that the role cannot work at the moment, and is alive all the same."""
        if self._ready:
            self._ready.unlink(missing_ok=True)

    def beat(self) -> None:
        """Say that the role's loop has just turned."""
        if self._alive:
            self._alive.touch()

    def stopped(self) -> None:
        """Say that the role does not work (yet, or any more)."""
        for path in (self._ready, self._alive):
            if path:
                path.unlink(missing_ok=True)


def why_not_alive(role: Path, *, max_age_seconds: float = MAX_AGE_SECONDS) -> str | None:
    """Why the role, named by `folder/<service>-<role>`, is not alive; None if it is."""
    try:
        age_seconds = time.time() - role.with_name(f"{role.name}.alive").stat().st_mtime
    except FileNotFoundError:
        return "it has not begun, or has ended"
    return f"its loop has not turned for {age_seconds:.0f} s" if age_seconds > max_age_seconds else None


def why_not_ready(role: Path, *, max_age_seconds: float = MAX_AGE_SECONDS) -> str | None:
    """Why the role cannot work at the moment; None if it can."""
    if not role.with_name(f"{role.name}.ready").exists():
        return "it cannot work at the moment"
    return why_not_alive(role, max_age_seconds=max_age_seconds)


def main(arguments: Sequence[str]) -> str | None:
    """Answer a probe: None for yes, else the reason."""
    match arguments:
        case [question, role, *rest] if question in {"alive", "ready"} and len(rest) < 2:
            ask = why_not_alive if question == "alive" else why_not_ready
            return ask(Path(role), max_age_seconds=float(rest[0]) if rest else MAX_AGE_SECONDS)
        case _:
            return USAGE


if __name__ == "__main__":
    if reason := main(sys.argv[1:]):
        # Kubernetes shows what a failed probe prints in the pod's events.
        sys.stdout.write(f"{reason}\n")
        raise SystemExit(1)
