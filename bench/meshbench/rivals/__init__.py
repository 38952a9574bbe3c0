"""Programs that do what Taskmesh does, in the ways that are usual; each is told by the environment where it belongs."""

from __future__ import annotations

import os
from pathlib import Path

DATABASE_URL = os.environ.get("TASKMESH_DATABASE_URL", "")
AMQP_URL = os.environ.get("TASKMESH_AMQP_URL", "")


def ready() -> None:
    """Say that the program may be measured."""
    (Path(os.environ["TASKMESH_HEALTH_DIR"]) / "rival.ready").touch()
