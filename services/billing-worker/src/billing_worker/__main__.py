"""`python -m billing_worker setup|worker|relay`."""

from __future__ import annotations

from pathlib import Path

from billing_worker.settings import BillingSettings
from billing_worker.tasks import app
from taskmesh.worker import main as run

SCRIPTS = Path(__file__).parent / "migrations"


def main() -> None:
    """Run the role that the command line names."""
    run(app, settings=BillingSettings, scripts=SCRIPTS)


if __name__ == "__main__":
    main()
