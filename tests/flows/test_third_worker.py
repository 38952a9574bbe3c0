"""A team adds a worker service to a running mesh: no change to the gateway, and no restart of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskmesh.client import UnknownType
from taskmesh.parts.postgres import create_database, drop_database
from taskmesh.testing.waiting import eventually

from .conftest import Mesh

# The whole package: one contract, one task, one entry point.
PACKAGE = '''
"""Greets people."""

from __future__ import annotations

from taskmesh.contracts import Command
from taskmesh.worker import MeshTask, WorkerApp, main

app = WorkerApp("greeting")


class Greet(Command, type="greeting.person.greet"):
    """Greets a person by name."""

    name: str


@app.task(Greet)
def greet(self: MeshTask, command: Greet) -> dict[str, str]:
    return {"greeting": f"Hello, {command.name}!"}


if __name__ == "__main__":
    main(app)
'''


@pytest.fixture
def greeting(mesh: Mesh, tmp_path: Path) -> Iterator[None]:
    """The third worker, set up and running."""
    package = tmp_path / "greeting_worker"
    package.mkdir()
    (package / "__main__.py").write_text(PACKAGE)
    database = create_database(mesh.variables["TASKMESH_POSTGRES_URL"], "greeting_test")
    health = tmp_path / "health"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TASKMESH_", "OTEL_"))},
        "TASKMESH_DATABASE_URL": database,
        "TASKMESH_AMQP_URL": mesh.variables["TASKMESH_AMQP_URL"],
        "TASKMESH_MANAGEMENT_URL": mesh.variables["TASKMESH_MANAGEMENT_URL"],
        "TASKMESH_HEALTH_DIR": str(health),
    }
    command = [sys.executable, "-m", "greeting_worker"]
    subprocess.run([*command, "setup"], env=environment, cwd=tmp_path, check=True)
    processes = [subprocess.Popen([*command, role], env=environment, cwd=tmp_path) for role in ("worker", "relay")]
    for role in ("worker", "relay"):
        eventually(lambda role=role: (health / f"greeting-{role}.ready").exists())
    yield
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=30)
    drop_database(mesh.variables["TASKMESH_POSTGRES_URL"], "greeting_test")


def test_the_package_is_under_sixty_lines() -> None:
    """A team can read it in a minute."""
    assert len(PACKAGE.splitlines()) < 60


def test_a_new_worker_joins_the_running_mesh(mesh: Mesh, request: pytest.FixtureRequest) -> None:
    """Its type is unknown, then listed with its schema, in the OpenAPI document, and executed."""
    with mesh.client() as client, mesh.http() as api:
        with pytest.raises(UnknownType):
            client.submit("greeting.person.greet", {"name": "Ada"})

        request.getfixturevalue("greeting")
        eventually(lambda: "greeting.person.greet" in {kind.type for kind in client.types()})
        eventually(lambda: "greeting.person.greet" in api.get("/openapi.json").text)

        task = client.submit("greeting.person.greet", {"name": "Ada"}, wait=30)
        assert task.succeeded
        assert task.result == {"greeting": "Hello, Ada!"}
