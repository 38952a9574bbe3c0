"""What a campaign tells while it goes on, with the seconds since its load began."""

from __future__ import annotations

import time

from rich.console import Console


class Journal:
    """Prints lines and keeps them for the report."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()
        self.lines: list[str] = []

    def begin(self) -> None:
        """Count seconds from now on."""
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def note(self, text: str) -> None:
        """Keep one line and print it."""
        line = f"{self.seconds:7.1f} s  {text}"
        self.lines.append(line)
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
