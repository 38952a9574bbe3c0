"""Writes the dashboards: `make dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from taskmesh_observability.dashboards import DASHBOARDS

FOLDER: Final = Path(__file__).parents[2] / "grafana" / "dashboards"


def written(dashboard: Dashboard) -> str:
    """The dashboard as its file has it."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every dashboard into its file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / name).write_text(written(dashboard))
        print(FOLDER / name)


if __name__ == "__main__":
    main()
