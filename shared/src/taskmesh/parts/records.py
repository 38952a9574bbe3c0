"""Small JSON files that only their owner may read: they hold passwords."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What was written last; nothing if it never was."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return record if isinstance(record, dict) else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace the file in one step: a reader sees the old record or the new one."""
    write_private(path, json.dumps(record, indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)
