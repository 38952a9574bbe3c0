"""What a person sees while the mesh starts: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console


class Progress:
    """Tells what is going on and how long each step took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, title: str, doing: str) -> Iterator[list[str]]:
        """Show a step while it runs, and one line when it is done.

        Yields:
            A list; what is put into it is shown behind the title in the end.
        """
        begun = time.monotonic()
        notes: list[str] = []
        status = self.console.status(f"{title}: {doing}") if self.console.is_terminal else contextlib.nullcontext()
        if not self.console.is_terminal:
            self.say(f"{title}: {doing}")
        with status:
            yield notes
        seconds = time.monotonic() - begun
        note = f"  [dim]{', '.join(notes)}[/dim]" if notes else ""
        took = f"  [dim]{seconds:.1f} s[/dim]" if seconds >= 0.1 else ""
        self.console.print(f"[green]✓[/green] {title}{note}{took}", highlight=False)

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
