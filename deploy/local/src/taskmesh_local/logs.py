"""Printing what the processes of the mesh have logged."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from taskmesh.parts.processes import log_end
from taskmesh_local.folders import Folders
from taskmesh_local.roles import NAMES, SERVICES

ALL = (*NAMES, *(f"{service}-setup" for service in SERVICES))
POLL_SECONDS = 0.25


def show(folders: Folders, names: Sequence[str] | None, *, follow: bool) -> int:
    """Print the end of the named logs (of all, without names), and what is added to them if asked to follow."""
    unknown = [name for name in names or () if name not in ALL]
    if unknown:
        print(f"There is no log of {', '.join(unknown)}. There are: {', '.join(ALL)}.", file=sys.stderr)
        return 2
    chosen = {name: folders.log(name) for name in names or ALL}
    width = max(len(name) for name in chosen)
    lines = 200 if names else 12
    try:
        for name, log in chosen.items():
            for line in log_end(log, lines=lines).splitlines():
                _print(name, line, width)
        if follow:
            _follow(chosen, width)
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:
        # The reader, `head` perhaps, has had enough. Python would try the rest again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _follow(chosen: dict[str, Path], width: int) -> None:
    read_to = {name: _size(log) for name, log in chosen.items()}
    while True:
        for name, log in chosen.items():
            size = _size(log)
            if size <= read_to[name]:
                continue
            with log.open("rb") as file:
                file.seek(read_to[name])
                text = file.read(size - read_to[name])
            read_to[name] = size
            for line in text.decode(errors="replace").splitlines():
                _print(name, line, width)
        time.sleep(POLL_SECONDS)


def _print(name: str, line: str, width: int) -> None:
    print(f"{name:<{width}} | {line}", flush=True)


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
