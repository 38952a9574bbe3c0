"""The environment of each container, held against the settings that its role reads, and its command against the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from billing_worker.settings import BillingSettings
from email_worker.settings import EmailSettings
from gateway.settings import (
    ApiSettings,
    GatewayRelaySettings,
    GatewaySetupSettings,
    ProjectorSettings,
    ReconcilerSettings,
    SchedulerSettings,
)
from manifests import Documents, Resource, named, of_kind, pod_of
from taskmesh.settings import SECRETS_DIR, CheckSettings, RelaySettings, SetupSettings
from taskmesh_local.roles import ROLE_NAMES

PACKAGES = {"gateway": "gateway", "billing-worker": "billing_worker", "email-worker": "email_worker"}
SETTINGS: dict[str, dict[str, type[BaseSettings]]] = {
    "gateway": {
        "setup": GatewaySetupSettings,
        "check": CheckSettings,
        "api": ApiSettings,
        "projector": ProjectorSettings,
        "scheduler": SchedulerSettings,
        "relay": GatewayRelaySettings,
        "reconciler": ReconcilerSettings,
    },
    "billing-worker": {
        "setup": SetupSettings,
        "check": CheckSettings,
        "worker": BillingSettings,
        "relay": RelaySettings,
    },
    "email-worker": {"setup": SetupSettings, "check": CheckSettings, "worker": EmailSettings, "relay": RelaySettings},
}
SECRETS = {
    "TASKMESH_DATABASE_URL": "postgresql://role:password@database/name",
    "TASKMESH_AMQP_URL": "amqps://user:password@broker/taskmesh",
    "TASKMESH_MANAGEMENT_URL": "https://user:password@broker:15671",
    "TASKMESH_OBJECT_STORE_URL": "s3://bucket/prefix?region=eu-west-1",
    "TASKMESH_SMTP_URL": "smtps://user:password@mail:465",
}
# What Python, OpenSSL and OpenTelemetry read.
FOREIGN = {"HOME", "SSL_CERT_FILE", "OTEL_EXPORTER_OTLP_ENDPOINT"}


def ours(documents: Documents) -> list[tuple[str, str, Resource, Resource]]:
    """Service, role, container and pod of everything that runs an image of the mesh."""
    return [
        (pod["metadata"]["labels"]["app.kubernetes.io/name"], container["args"][0], container, pod["spec"])
        for each in of_kind(documents, "Deployment", "Job")
        for pod in [pod_of(each)]
        if pod["metadata"]["labels"].get("app.kubernetes.io/name") in PACKAGES
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", []))
    ]


def variables(documents: Documents, container: Resource) -> dict[str, str]:
    told: dict[str, str] = {}
    for source in container.get("envFrom", []):
        told |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    return told | {each["name"]: each["value"] for each in container.get("env", [])}


def files(spec: Resource) -> set[str]:
    [volume] = [each for each in spec["volumes"] if each["name"] == "secrets"]
    return {item["path"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]}


def known(service: str) -> set[str]:
    """Every variable that some role of the service reads."""
    fields = {field for settings in SETTINGS[service].values() for field in settings.model_fields}
    return {f"TASKMESH_{field.upper()}" for field in fields} | {SECRETS_DIR} | FOREIGN


def contradictions(documents: Documents, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Variables that no role of the service reads, and roles that do not start with what they are told."""
    faults = []
    for service, role, container, spec in ours(documents):
        told, secrets = variables(documents, container), files(spec)
        faults += [f"{service} {role}: {name} is read by nobody" for name in (told.keys() | secrets) - known(service)]
        with monkeypatch.context() as environment:
            for name in SECRETS:
                environment.delenv(name, raising=False)
            for name, value in told.items():
                environment.setenv(name, value)
            for path in folder.iterdir():
                path.unlink()
            for name in secrets:
                (folder / name).write_text(SECRETS.get(name, ""))
            try:
                SETTINGS[service][role](_secrets_dir=folder)
            except ValueError as error:
                faults.append(f"{service} {role}: {error}")
    return faults


@pytest.mark.parametrize("overlay", ["local", "staging", "production"])
def test_settings_contract_holds(render, overlay, tmp_path, monkeypatch):
    """Each role starts with what it is told, and is told nothing that nobody reads."""
    assert contradictions(render(overlay), tmp_path, monkeypatch) == []


@pytest.mark.parametrize("overlay", ["local", "staging", "production"])
def test_settings_contract_of_secret_files(render, overlay):
    """Each container looks for its secrets where its pod has mounted them."""
    documents = render(overlay)
    for _, _, container, _ in ours(documents):
        [mount] = [each for each in container["volumeMounts"] if each["name"] == "secrets"]
        assert variables(documents, container)[SECRETS_DIR] == mount["mountPath"]


def drop_secret(documents: Documents) -> None:
    spec = pod_of(named(documents, "Deployment", "email-worker"))["spec"]
    [volume] = [each for each in spec["volumes"] if each["name"] == "secrets"]
    volume["projected"]["sources"].pop()


def configure(**told: str):
    def plant(documents: Documents) -> None:
        for each in of_kind(documents, "ConfigMap"):
            if each["metadata"]["name"].startswith("taskmesh-email"):
                each["data"].update(told)

    return plant


@pytest.mark.parametrize(
    "plant",
    [drop_secret, configure(TASKMESH_WORKER_CONCURENCY="4"), configure(TASKMESH_WORKER_CONCURRENCY="0")],
    ids=["required-and-missing", "misspelt", "out-of-range"],
)
def test_settings_contract_that_is_broken_is_caught(production, tmp_path, monkeypatch, plant):
    plant(production)

    assert contradictions(production, tmp_path, monkeypatch) != []


@pytest.mark.parametrize("service", PACKAGES)
def test_settings_contract_of_commands(production, service):
    """Each role that a container names is one that the program knows, and no other is among them."""
    roles = {role for name, role, _, _ in ours(production) if name == service}
    answer = subprocess.run(
        [sys.executable, "-m", PACKAGES[service], "--help"], capture_output=True, text=True, check=True, timeout=60
    )

    choices = answer.stdout.partition("{")[2].partition("}")[0].split(",")
    assert set(choices) - {"keys"} == roles == set(SETTINGS[service])


def test_settings_contract_of_probes(production):
    """Every role that writes health files is asked for its own, by its own name, where it writes them."""
    asked = {}
    for _, _, container, _ in ours(production):
        folder = Path(variables(production, container)["TASKMESH_HEALTH_DIR"])
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = container.get(kind, {}).get("exec", {}).get("command")
            if command:
                assert command[:3] == ["python", "-m", "taskmesh.health"]
                assert command[3] == ("ready" if kind == "readinessProbe" else "alive")
                assert Path(command[4]).parent == folder
                asked.setdefault(Path(command[4]).name, set()).add(kind)

    assert set(asked) == set(ROLE_NAMES) - {"gateway-api"}
    assert all(len(kinds) == 3 for kinds in asked.values())
