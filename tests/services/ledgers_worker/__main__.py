"""`python -m ledgers_worker setup|worker|relay`."""

from __future__ import annotations

from pathlib import Path

from ledgers_worker.tasks import LedgerSettings, app
from taskmesh.worker import main

if __name__ == "__main__":
    main(app, settings=LedgerSettings, scripts=Path(__file__).parent / "migrations")
