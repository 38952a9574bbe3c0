"""Where one local mesh keeps what it has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "TASKMESH_LOCAL_FOLDER"


@dataclass(frozen=True, slots=True)
class Folders:
    """The files of a mesh, all below one folder that is in no version control."""

    root: Path

    @classmethod
    def find(cls) -> Folders:
        """`$TASKMESH_LOCAL_FOLDER`, else `.taskmesh` beside the workspace this package was installed from."""
        if given := os.environ.get(FOLDER_VARIABLE):
            return cls(Path(given).absolute())
        workspace = Path(__file__).resolve().parents[4]
        return cls((workspace if (workspace / "uv.lock").exists() else Path.cwd()) / ".taskmesh")

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def env(self) -> Path:
        return self.root / "env"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def health(self) -> Path:
        return self.root / "health"

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"

    @property
    def rabbitmq(self) -> Path:
        return self.root / "rabbitmq"

    @property
    def mails(self) -> Path:
        return self.root / "mails.db"

    @property
    def traces(self) -> Path:
        return self.root / "traces.db"

    def log(self, name: str) -> Path:
        """Where the process of this name writes."""
        if name in {"postgres", "rabbitmq"}:
            return self.root / name / f"{name}.log"
        return self.root / "logs" / f"{name}.log"
