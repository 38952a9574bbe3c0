"""The files in which the two pages keep what they have received."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on the file, committed unless it raises.

    A connection per use is cheap for a local file, and free of questions about threads. Only its owner may read it:
    mails and spans tell of people.
    """
    path.touch(mode=0o600)
    database = sqlite3.connect(path, timeout=10)
    try:
        with database:
            yield database
    finally:
        database.close()
