"""A release is rolled back for real: the code of an older commit runs on what this one's `setup` and gateway have made.

`TASKMESH_TEST_PREVIOUS` names the commit, which a clone of the last commit alone does not have. Its code runs with the
packages that are installed here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from taskmesh.client import Taskmesh
from taskmesh.parts.postgres import ServiceDatabase
from taskmesh.parts.rabbitmq import create_observer, create_service_users
from taskmesh.testing.plugin import TestBroker
from taskmesh.testing.smtp import SmtpSink
from taskmesh.testing.waiting import eventually

from .conftest import ROOT

PREVIOUS = os.environ.get("TASKMESH_TEST_PREVIOUS")
PACKAGES = {"gateway": "gateway", "billing": "billing_worker", "email": "email_worker"}
GATEWAY = [("gateway", role) for role in ("api", "projector", "relay")]
EVERYTHING = [
    *GATEWAY,
    ("gateway", "scheduler"),
    ("gateway", "reconciler"),
    *((service, role) for service in ("billing", "email") for role in ("relay", "worker")),
]
TYPES = {"billing.invoice.issue", "email.message.send"}
SETTINGS = {
    "TASKMESH_HTTP_HOST": "127.0.0.1",
    "TASKMESH_HTTP_PORT": "0",
    "TASKMESH_MAIL_DOMAIN": "example.com",
    "TASKMESH_MAIL_FROM": "Example Ltd <billing@example.com>",
    "TASKMESH_SELLER_NAME": "Example Ltd",
    "TASKMESH_SELLER_ADDRESS": "1 Example Street|Dublin D02 XY00|Ireland",
    "TASKMESH_SELLER_VAT_ID": "IE6388047V",
    "TASKMESH_SELLER_IBAN": "IE29AIBK93115212345678",
    "TASKMESH_SELLER_EMAIL": "billing@example.com",
}

pytestmark = [
    pytest.mark.skipif(PREVIOUS is None, reason="TASKMESH_TEST_PREVIOUS does not name the commit to roll back to"),
    pytest.mark.timeout(900),
]


@dataclass
class Release:
    """A release's programs: this commit's, or those in a folder with another one's files."""

    code: Path
    environments: dict[str, dict[str, str]]
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, service: str, *words: str, rights: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as the manifests do: `setup` with rights of its own."""
        command = [sys.executable, "-m", PACKAGES[service], *words]
        environment = self._environment(f"{service}{rights}")
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    def setup(self) -> dict[str, int]:
        """Run `setup` of every service; returns their exit codes."""
        return {service: self.run(service, "setup", rights="-setup").returncode for service in PACKAGES}

    def start(self, roles: list[tuple[str, str]]) -> None:
        """Start the roles, and return when all are ready."""
        for service, role in roles:
            self._ready(service, role).unlink(missing_ok=True)
            command = [sys.executable, "-m", PACKAGES[service], role]
            with self.log(service, role).open("wb") as log:
                process = subprocess.Popen(command, env=self._environment(service), stdout=log, stderr=log)
            self.processes.append(process)
        for service, role in roles:
            eventually(self._ready(service, role).exists, seconds=180, explain=self.log(service, role).read_text)

    def stop(self) -> None:
        """Tell every process to end, and return when all have."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=120)
        self.processes.clear()

    def client(self, key: str) -> Taskmesh:
        """A caller of its api."""
        found = re.search(r"http://127\.0\.0\.1:\d+", self.log("gateway", "api").read_text())
        assert found
        return Taskmesh(found[0], key)

    def errors(self) -> list[str]:
        """What its processes have said that a person would have to look at."""
        lines = [line for log in self.folder.glob(f"{self.code.name}-*.log") for line in log.read_text().splitlines()]
        return [line for line in lines if re.search(r'"level": ?"(ERROR|CRITICAL)"|^Traceback', line)]

    def path_of(self, module: str) -> Path:
        """Where its programs find a module."""
        command = [sys.executable, "-c", f"import {module}; print({module}.__file__)"]
        answer = subprocess.run(command, env=self._environment("gateway"), capture_output=True, text=True, check=True)
        return Path(answer.stdout.strip())

    def log(self, service: str, role: str) -> Path:
        return self.folder / f"{self.code.name}-{service}-{role}.log"

    def _ready(self, service: str, role: str) -> Path:
        return self.folder / f"{service}-{role}.ready"

    def _environment(self, name: str) -> dict[str, str]:
        folders = [self.code / "shared" / "src", *(self.code / "services").glob("*/src")]
        return self.environments[name] | {"PYTHONPATH": os.pathsep.join(map(str, folders))}


@pytest.fixture
def environments(
    broker: TestBroker,
    service_database: Callable[[str], ServiceDatabase],
    smtp_sink: SmtpSink,
    tmp_path: Path,
) -> dict[str, dict[str, str]]:
    """What each service's programs are told, with the rights that a deployment has."""
    kept = {name: it for name, it in os.environ.items() if not name.startswith(("TASKMESH_", "OTEL_", "PYTHONPATH"))}
    kept |= SETTINGS | {
        "TASKMESH_HEALTH_DIR": str(tmp_path),
        "TASKMESH_OBJECT_STORE_URL": f"file://{tmp_path}/objects",
        "TASKMESH_SMTP_URL": smtp_sink.url,
    }
    observer, found = create_observer(broker, broker.vhost), {}
    for service in PACKAGES:
        tables, users = service_database(service), create_service_users(broker, broker.vhost, service)
        for name, *urls in (
            (service, tables.url, users.amqp_url, observer),
            (f"{service}-setup", tables.owner_url, users.setup_amqp_url, users.setup_management_url),
        ):
            variables = ("TASKMESH_DATABASE_URL", "TASKMESH_AMQP_URL", "TASKMESH_MANAGEMENT_URL")
            found[name] = kept | dict(zip(variables, urls, strict=True))
    return found


@pytest.fixture
def this_release(environments: dict[str, dict[str, str]], tmp_path: Path) -> Iterator[Release]:
    release = Release(ROOT, environments, tmp_path)
    yield release
    release.stop()


@pytest.fixture
def release_before(environments: dict[str, dict[str, str]], tmp_path: Path) -> Iterator[Release]:
    code = tmp_path / "before"
    code.mkdir()
    files = subprocess.run(["git", "archive", str(PREVIOUS)], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", "--directory", code], input=files, check=True)
    release = Release(code, environments, tmp_path)
    for module in ("taskmesh", *PACKAGES.values()):
        assert code in release.path_of(module).parents
    yield release
    release.stop()


def issue_invoice(mesh: Taskmesh, **options: object) -> str:
    """Have an invoice accepted, which becomes a document, an event and a mail; returns the task's id."""
    buyer = {"name": "Ada", "address": ["1 Street"], "country": "GB", "email": "ada@example.org"}
    line = {"description": "Notes", "unit_price": "120.00", "tax": {"rate": "19"}}
    payload = {"buyer": buyer, "currency": "EUR", "lines": [line]}
    return str(mesh.submit("billing.invoice.issue", payload, **options).id)  # type: ignore[arg-type]


def test_what_a_release_has_accepted_is_finished_by_the_release_before_it(this_release, release_before, smtp_sink):
    """Tasks in queues and in the outbox of the new release; then a new one that the old release itself takes."""
    assert this_release.setup() == dict.fromkeys(PACKAGES, 0)
    this_release.start(GATEWAY)
    scopes = "tasks:write,tasks:read,types:read"
    key = this_release.run("gateway", "keys", "create", "--name", "test", "--scopes", scopes).stdout.strip()
    with this_release.client(key) as mesh:
        eventually(lambda: {each.type for each in mesh.types()} >= TYPES)
        tasks = [issue_invoice(mesh), issue_invoice(mesh, delay=5)]
    this_release.stop()

    release_before.start(EVERYTHING)
    with release_before.client(key) as mesh:
        tasks.append(issue_invoice(mesh))
        states = [each.state for task in tasks for each in mesh.wait_tree(task, timeout=180)]

    assert states == ["succeeded"] * 3 * len(tasks)
    assert len(smtp_sink.wait_for(len(tasks), timeout_seconds=60)) == len(tasks)
    release_before.stop()
    assert release_before.errors() == []


def test_the_jobs_and_init_containers_of_the_release_before_pass_on_the_new_schema(this_release, release_before):
    """Whoever applies the old overlay runs its `setup` and its `check`, too."""
    assert this_release.setup() == dict.fromkeys(PACKAGES, 0)

    assert release_before.setup() == dict.fromkeys(PACKAGES, 0)
    assert {service: release_before.run(service, "check").returncode for service in PACKAGES} == dict.fromkeys(
        PACKAGES, 0
    )
    assert this_release.run("gateway", "check").returncode == 0
