"""One running mesh for all flow tests: every role a process of its own, every part real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from taskmesh.client import Taskmesh
from taskmesh.parts.processes import Process
from taskmesh.parts.rabbitmq.programs import RELEASE_VARIABLE
from taskmesh.testing.waiting import eventually
from taskmesh_local import environment
from taskmesh_local.folders import FOLDER_VARIABLE, Folders


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the flows time for a whole mesh."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flows)
            item.add_marker(pytest.mark.timeout(300))


class Mesh:
    """The running mesh, as its users and its operators see it."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == RELEASE_VARIABLE or not name.startswith("TASKMESH_")
        }
        self._environment = kept | {FOLDER_VARIABLE: str(folders.root), "COLUMNS": "200"}

    def run(self, *words: str) -> str:
        """One command of the local mesh; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "taskmesh_local", *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def variables(self) -> dict[str, str]:
        """What `.taskmesh/env` exports."""
        return environment.read(self._folders.env)

    def client(self, *, timeout: float = 60.0) -> Taskmesh:
        return Taskmesh(self.variables["TASKMESH_URL"], self.variables["TASKMESH_API_KEY"], timeout=timeout)

    def http(self) -> httpx.Client:
        """The bare API, without the client's retries."""
        headers = {"Authorization": f"Bearer {self.variables['TASKMESH_API_KEY']}"}
        return httpx.Client(base_url=self.variables["TASKMESH_URL"], headers=headers, timeout=60, trust_env=False)

    def rows(self, service: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read a service's database."""
        url = self.variables[f"TASKMESH_{service.upper()}_DATABASE_URL"]
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(statement, parameters).fetchall()

    def mails(self, address: str) -> list[dict[str, Any]]:
        """What the inbox has received for an address."""
        answer = httpx.get(
            f"{self.variables['TASKMESH_INBOX_URL']}/api/messages", params={"to": address}, trust_env=False
        )
        return list(answer.raise_for_status().json()["items"])

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """A trace as the trace page has it, or None while it is unknown."""
        answer = httpx.get(f"{self.variables['TASKMESH_TRACES_URL']}/api/traces/{trace_id}", trust_env=False)
        return dict(answer.json()) if answer.status_code == httpx.codes.OK else None

    def kill(self, name: str) -> None:
        """SIGKILL a process of the mesh, its children too, and wait until it is gone."""
        if name in ("postgres", "rabbitmq"):
            record = json.loads((self._folders.root / name / f"{name}.json").read_text())["process"]
        else:
            record = json.loads(self._folders.state.read_text())["processes"][name]
        process = Process.from_json(record)
        os.kill(process.pid, signal.SIGKILL)
        eventually(lambda: not process.is_running())


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The mesh, up; a test that takes something down brings it up again."""
    mesh = Mesh(Folders(tmp_path_factory.mktemp("mesh") / "mesh"))
    mesh.run("up")
    yield mesh
    mesh.run("down", "--purge")
