"""Other people's tools over what is rendered: the schemas of Kubernetes and of the operators, and a scan of policies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manifests import Documents, Resource, named, of_kind, pod_of

from .conftest import SCHEMAS, find

VERSIONS = ("1.32", "1.33", "1.34", "1.35", "1.36")
TOOLS = "make k8s-check installs it"


def write(folder: Path, documents: Documents) -> Path:
    path = folder / "manifests.yaml"
    path.write_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
    return path


def is_built_in(resource: Resource) -> bool:
    group, _, _ = resource["apiVersion"].rpartition("/")
    return "." not in group or group in {"networking.k8s.io", "rbac.authorization.k8s.io", "scheduling.k8s.io"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=100)


VALIDATE = """
import json, sys
import kubernetes_validate
documents = json.load(sys.stdin)
for version in sys.argv[1:]:
    for each in documents:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except Exception as error:
            print(version, each["kind"], each["metadata"]["name"], str(error)[:300])
"""


def against_kubernetes(documents: Documents, *versions: str) -> str:
    """What the schemas of these versions say against built-in kinds: all in one process, because its start is the dearest part."""
    python = Path(find("kubernetes-validate", how=TOOLS)).with_name("python")
    answer = subprocess.run(
        [python, "-c", VALIDATE, *versions],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return answer.stdout + answer.stderr


def against_operators(path: Path) -> str:
    if not (SCHEMAS / "crdcheck.py").exists():
        pytest.skip(
            f"the schemas of the operators are not in {SCHEMAS.parent.name}/{SCHEMAS.name} beside this checkout"
        )
    answer = run(sys.executable, SCHEMAS / "crdcheck.py", SCHEMAS, path)
    return answer.stdout + answer.stderr if answer.returncode else ""


def against_policies(path: Path) -> str:
    """What checkov says; it is not asked for processor limits, which the manifests leave out on purpose."""
    tool = find("checkov", how=TOOLS)
    command = ("--framework", "kubernetes", "--quiet", "--compact", "--skip-download", "--skip-check", "CKV_K8S_11")
    answer = run(tool, *command, "-f", path)
    return answer.stdout + answer.stderr if answer.returncode else ""


def test_each_supported_version_of_kubernetes_takes_the_built_in_kinds(render):
    documents = [each for overlay in ("local", "production") for each in render(overlay) if is_built_in(each)]

    assert against_kubernetes(documents, *VERSIONS) == ""


@pytest.mark.parametrize(
    "plant",
    [
        lambda it: it["spec"].update(replica=2),
        lambda it: it["spec"].update(minReadySeconds="soon"),
        lambda it: pod_of(it)["spec"]["containers"][0].update(envfrom=[]),
    ],
    ids=["unknown-field", "wrong-type", "misspelt-field"],
)
def test_a_fault_in_a_built_in_kind_is_caught(production, plant):
    deployment = named(production, "Deployment", "billing-worker")

    plant(deployment)

    assert against_kubernetes([deployment], VERSIONS[-1]) != ""


def test_each_operator_takes_its_own_kinds(tmp_path, render):
    documents = [each for overlay in ("staging", "production") for each in render(overlay) if not is_built_in(each)]

    assert against_operators(write(tmp_path, documents)) == ""


def test_a_fault_in_an_operators_kind_is_caught(tmp_path, production):
    scaled = named(production, "ScaledObject", "billing-worker")

    scaled["spec"]["fallback"]["behaviour"] = "static"

    assert "behaviour" in against_operators(write(tmp_path, [scaled]))


def test_a_scan_of_policies_finds_nothing(tmp_path, production):
    assert against_policies(write(tmp_path, [each for each in production if each["kind"] != "ConfigMap"])) == ""


def test_a_worker_without_a_readiness_probe_is_found_by_the_scan(tmp_path, production):
    deployment = named(production, "Deployment", "billing-worker")
    policies = of_kind(production, "NetworkPolicy")

    del pod_of(deployment)["spec"]["containers"][0]["readinessProbe"]

    assert "CKV_K8S_9" in against_policies(write(tmp_path, [deployment, *policies]))
