"""The mesh from its images, each container as the manifests say: read-only, without a capability, not root, with the
narrow rights of its role. Needs podman, and images that `make images` built: `TASKMESH_TEST_IMAGES=dev` names their tag."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

import httpx
import pytest

from manifests import Documents, Resource, named, of_kind, pod_of
from taskmesh.client import Taskmesh
from taskmesh.parts.ports import free_port
from taskmesh.parts.rabbitmq import create_observer, create_service_users
from taskmesh.testing.waiting import eventually

from .conftest import find

TAG = os.environ.get("TASKMESH_TEST_IMAGES")
SERVICES = ("gateway", "billing", "email")
SCOPES = "tasks:write,tasks:read,types:read,services:read"

pytestmark = [
    pytest.mark.skipif(TAG is None, reason="TASKMESH_TEST_IMAGES does not name the tag of images to run"),
    pytest.mark.timeout(900),
]


def podman(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [find("podman", how="apt-get install podman runc"), "--runtime", "runc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=300)


@dataclass
class Containers:
    """The pods of an overlay as containers of this machine's network."""

    documents: Documents
    folder: Path
    secrets: dict[str, dict[str, str]]
    told: dict[str, str]
    """In place of what the ConfigMaps say."""
    started: dict[str, str] = field(default_factory=dict)

    def options(self, spec: Resource, container: Resource) -> list[str]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        user = spec["securityContext"]["runAsUser"]
        options = [
            "--read-only",
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            "--user",
            f"{user}:{user}",
        ]
        options += ["--network", "host", "--tmpfs", "/tmp", "--tmpfs", "/run/taskmesh:mode=1777"]
        for mount in container["volumeMounts"]:
            if mount["name"] == "secrets":
                options += ["--volume", f"{self._secrets(spec)}:{mount['mountPath']}:ro"]
            elif mount["name"] == "objects":
                options += ["--volume", f"{self._objects()}:{mount['mountPath']}"]
        for name, value in self._variables(container).items():
            options += ["--env", f"{name}={value}"]
        return options

    def run(self, name: str, spec: Resource, container: Resource, *more: str) -> subprocess.CompletedProcess[str]:
        image = f"localhost/{container['image'].rpartition(':')[0]}:{TAG}"
        return podman("run", "--name", name, *more, *self.options(spec, container), image, *container["args"])

    def job(self, name: str) -> None:
        """Run a Job to its end."""
        spec = pod_of(named(self.documents, "Job", name))["spec"]
        self.run(f"taskmesh-test-{name}-{token_hex(3)}", spec, spec["containers"][0], "--rm")

    def deployment(self, name: str) -> None:
        """Run a pod's init container to its end, and start the other."""
        spec = pod_of(named(self.documents, "Deployment", name))["spec"]
        for each in spec["initContainers"]:
            self.run(f"taskmesh-test-{name}-{token_hex(3)}", spec, each, "--rm")
        self.started[name] = f"taskmesh-test-{name}-{token_hex(3)}"
        self.run(self.started[name], spec, spec["containers"][0], "--detach")

    def probe(self, name: str, kind: str) -> bool:
        """Ask what a kubelet would ask."""
        [container] = pod_of(named(self.documents, "Deployment", name))["spec"]["containers"]
        probe = container[kind]
        if "httpGet" in probe:
            url = f"http://127.0.0.1:{self.told['TASKMESH_HTTP_PORT']}{probe['httpGet']['path']}"
            try:
                return httpx.get(url, trust_env=False).is_success
            except httpx.TransportError:
                return False
        return podman("exec", self.started[name], *probe["exec"]["command"], check=False).returncode == 0

    def logs(self, name: str) -> str:
        answer = podman("logs", "--tail", 20, self.started[name], check=False)
        return answer.stdout + answer.stderr

    def stop(self, name: str) -> int:
        """As a kubelet does; returns the exit code."""
        grace = pod_of(named(self.documents, "Deployment", name))["spec"]["terminationGracePeriodSeconds"]
        podman("stop", "--time", min(grace, 120), self.started[name])
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.started[name]).stdout)

    def remove(self) -> None:
        for container in self.started.values():
            podman("rm", "--force", "--time", 1, container, check=False)

    def _variables(self, container: Resource) -> dict[str, str]:
        told: dict[str, str] = {}
        for source in container["envFrom"]:
            told |= named(self.documents, "ConfigMap", source["configMapRef"]["name"])["data"]
        return told | {each["name"]: each["value"] for each in container.get("env", [])} | self.told

    def _secrets(self, spec: Resource) -> Path:
        """A folder as the kubelet would mount it: the keys that the pod names, and no others."""
        folder = self.folder / token_hex(6)
        folder.mkdir(mode=0o755)
        [volume] = [each for each in spec["volumes"] if each["name"] == "secrets"]
        for source in volume["projected"]["sources"]:
            # Kustomize has given the names of the local overlay's secrets a hash.
            name = source["secret"]["name"].rpartition("-")[0]
            for item in source["secret"]["items"]:
                (folder / item["path"]).write_text(self.secrets[name][item["key"]])
        return folder

    def _objects(self) -> Path:
        folder = self.folder / "objects"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        return folder


@pytest.fixture
def containers(render, postgres, broker, service_database, smtp_sink, tmp_path) -> Iterator[Containers]:
    """The local overlay's pods, with databases, users and addresses of this test."""
    tmp_path.chmod(0o755)
    secrets: dict[str, dict[str, str]] = {
        "taskmesh-gateway-observer": {"TASKMESH_MANAGEMENT_URL": create_observer(broker, broker.vhost)},
        "taskmesh-email-smtp": {"TASKMESH_SMTP_URL": smtp_sink.url},
    }
    for service in SERVICES:
        database, users = service_database(service), create_service_users(broker, broker.vhost, service)
        secrets[f"taskmesh-{service}"] = {
            "TASKMESH_DATABASE_URL": database.url,
            "TASKMESH_AMQP_URL": users.amqp_url,
        }
        secrets[f"taskmesh-{service}-setup"] = {
            "TASKMESH_DATABASE_URL": database.owner_url,
            "TASKMESH_AMQP_URL": users.setup_amqp_url,
            "TASKMESH_MANAGEMENT_URL": users.setup_management_url,
        }
        secrets[f"taskmesh-{service}-objects"] = {"TASKMESH_OBJECT_STORE_URL": "file:///objects"}
    # All share this machine's network, where each page of metrics needs a port of its own.
    told = {"TASKMESH_HTTP_PORT": str(free_port()), "TASKMESH_HTTP_HOST": "127.0.0.1", "TASKMESH_METRICS_PORT": "0"}
    found = Containers(render("local"), tmp_path, secrets, told)
    yield found
    found.remove()


def test_the_mesh_runs_from_its_images_with_the_rights_of_the_manifests(containers, smtp_sink):
    """From the setup Jobs to a mail with its document; then every role stops when it is told to."""
    roles = [each["metadata"]["name"] for each in of_kind(containers.documents, "Deployment")]
    roles.remove("mailpit")
    for service in SERVICES:
        containers.job(f"{service}-setup")
    for name in roles:
        containers.deployment(name)
    for name in roles:
        eventually(
            lambda name=name: containers.probe(name, "readinessProbe"),
            seconds=180,
            explain=lambda name=name: containers.logs(name),
        )
        assert containers.probe(name, "livenessProbe"), name

    command = ("python", "-m", "gateway", "keys", "create", "--name", "test", "--scopes", SCOPES)
    key = podman("exec", containers.started["gateway-api"], *command).stdout.strip()
    url = f"http://127.0.0.1:{containers.told['TASKMESH_HTTP_PORT']}"
    with Taskmesh(url, key) as mesh:
        eventually(lambda: {each.type for each in mesh.types()} >= {"billing.invoice.issue", "email.message.send"})
        buyer = {
            "name": "Ada Lovelace",
            "address": ["12 St James's Square"],
            "country": "GB",
            "email": "ada@example.org",
        }
        line = {"description": "Notes", "unit_price": "120.00", "tax": {"rate": "19"}}
        task = mesh.submit("billing.invoice.issue", {"buyer": buyer, "currency": "EUR", "lines": [line]})
        states = {each.type: each.state for each in mesh.wait_tree(task.id, timeout=180)}

    assert states == {
        "billing.invoice.issue": "succeeded",
        "billing.document.render": "succeeded",
        "billing.document.ready": "succeeded",
    }
    [mail] = smtp_sink.wait_for(1, timeout_seconds=60)
    assert mail.rcpt_to == ["ada@example.org"]
    headers = {"Authorization": f"Bearer {key}"}

    def outstanding() -> httpx.Response:
        return httpx.get(f"{url}/v1/services/email/outstanding", headers=headers, trust_env=False)

    answer = eventually(lambda: (it := outstanding()).is_success and it, explain=lambda: outstanding().text)
    assert answer.json()["work_seconds"] == 0
    assert {name: containers.stop(name) for name in roles} == dict.fromkeys(roles, 0)
