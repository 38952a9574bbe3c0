"""The roles of the trial worker: `python -m taskmesh_local.faults.trials setup|worker|relay`."""

from __future__ import annotations

from pathlib import Path

from taskmesh.worker import main as run
from taskmesh_local.faults.trials.tasks import app


def main() -> None:
    """Run the role that the command line names."""
    run(app, scripts=Path(__file__).parent / "migrations")


if __name__ == "__main__":
    main()
