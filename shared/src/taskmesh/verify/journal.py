"""What happens to the deliveries of one run, told by the worker's processes to the verifier: lines in a file."""

from __future__ import annotations

import os
from collections import Counter
from enum import StrEnum
from pathlib import Path

HEADER = "taskmesh_verify"
"""The header of a message that says which fault its task is to meet."""


class Fault(StrEnum):
    KILL = "kill"
    """The process dies right before the last commit of the task's first run."""
    MEET = "meet"
    """The last commit waits until another copy of the task runs, too."""


class Step(StrEnum):
    BEGUN = "begun"
    ENDED = "ended"
    KILLED = "killed"
    MET = "met"
    ACKNOWLEDGED = "acknowledged"
    PARKED = "parked"
    """Rejected, and so dead-lettered."""


class Journal:
    """One run's file; every process appends to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: Step, task_id: str) -> None:
        """Append one step; lines of several processes do not mix, and are there although the writer dies."""
        line = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(line, f"{step} {task_id}\n".encode())
        finally:
            os.close(line)

    def count(self, task_id: str) -> Counter[str]:
        """How often each step of the task was taken."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            lines = []
        return Counter(line.partition(" ")[0] for line in lines if line.endswith(f" {task_id}"))
