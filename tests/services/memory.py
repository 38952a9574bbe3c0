"""What processes take of the machine's memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

KIB = 1024


def children_of(pid: int) -> list[int]:
    """The processes that a process has forked and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_bytes(pid: int) -> int:
    """The memory of a process, what it shares with others included."""
    return _field(pid, "Rss")


def proportional_bytes(pid: int) -> int:
    """The memory of a process, with its part of what it shares."""
    return _field(pid, "Pss")


def _field(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * KIB
