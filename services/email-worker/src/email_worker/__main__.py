"""The roles of email-worker: `python -m email_worker setup|worker|relay`."""

from __future__ import annotations

from pathlib import Path

from email_worker.settings import EmailSettings
from email_worker.tasks import app
from taskmesh.worker import main as run


def main() -> None:
    """Run the role that the command line names."""
    run(app, settings=EmailSettings, scripts=Path(__file__).parent / "migrations")


if __name__ == "__main__":
    main()
