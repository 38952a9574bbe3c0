"""Secrets by name only: each key that something reads is made by an ExternalSecret, and none is made for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifests import WORKLOADS, Documents, Resource, name_of, named, of_kind, pod_of

README = Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "README.md"
Key = tuple[str, str]
PAIR = ("username", "password")
TLS = ("tls.crt", "tls.key", "ca.crt")


def read_keys(documents: Documents) -> set[Key]:
    """Secret and key of everything that is read."""
    found: set[Key] = set()
    for each in documents:
        match each["kind"]:
            case kind if kind in WORKLOADS:
                found |= set(_of_pod(pod_of(each)["spec"]))
            case "TriggerAuthentication":
                found |= {(it["name"], it["key"]) for it in each["spec"]["secretTargetRef"]}
            case "User":
                found |= {(each["spec"]["importCredentialsSecret"]["name"], key) for key in PAIR}
            case "Cluster":
                owner = each["spec"]["bootstrap"]["initdb"]["secret"]["name"]
                roles = [role["passwordSecret"]["name"] for role in each["spec"]["managed"]["roles"]]
                found |= {(name, key) for name in (owner, *roles) for key in PAIR}
            case "RabbitmqCluster":
                found |= {(each["spec"]["tls"]["secretName"], key) for key in TLS}
            case "Ingress":
                found |= {(it["secretName"], key) for it in each["spec"]["tls"] for key in TLS[:2]}
    return found


def _of_pod(spec: Resource) -> Iterator[Key]:
    for volume in spec.get("volumes", []):
        for source in volume.get("projected", {}).get("sources", []):
            if secret := source.get("secret"):
                yield from ((secret["name"], item["key"]) for item in secret["items"])
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]


def made_keys(documents: Documents) -> set[Key]:
    return {
        (each["spec"]["target"]["name"], entry["secretKey"])
        for each in of_kind(documents, "ExternalSecret")
        for entry in each["spec"]["data"]
    }


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_secret_keys_that_are_read_are_made_and_no_others(render, overlay):
    documents = render(overlay)

    assert made_keys(documents) == read_keys(documents)


def test_secret_keys_of_a_laptop_are_in_its_overlay(render):
    """Values that everybody knows, and in no other overlay."""
    documents = render("local")
    made = {(each["metadata"]["name"], key) for each in of_kind(documents, "Secret") for key in each.get("data", {})}

    assert read_keys(documents) - made == set()


def test_secret_keys_are_all_in_the_readme(render):
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `taskmesh-")]
    described = {
        (name, key)
        for row in rows
        for names, keys in [row.split("|")[1:3]]
        for name in re.findall("`([^`]+)`", names)
        for key in re.findall("`([^`]+)`", keys)
    }

    assert read_keys(render("production")) - described == set()


def test_secret_keys_that_nobody_makes_are_caught(production):
    entries = named(production, "ExternalSecret", "taskmesh-billing-setup")["spec"]["data"]

    entries.pop()

    assert read_keys(production) - made_keys(production) == {("taskmesh-billing-setup", "TASKMESH_MANAGEMENT_URL")}


def test_secret_keys_reach_a_process_as_files_and_never_in_its_environment(production):
    for each in of_kind(production, *WORKLOADS):
        spec = pod_of(each)["spec"]
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            assert not any("secretRef" in source for source in container.get("envFrom", [])), name_of(each)
            assert not any("secretKeyRef" in it.get("valueFrom", {}) for it in container.get("env", [])), name_of(each)


def test_secret_keys_of_the_owner_reach_nobody_but_setup(production):
    """No run-time role is given the database's owner, the setup user of the broker, or another service's anything."""
    for each in of_kind(production, "Deployment", "Job"):
        name = each["metadata"]["name"]
        service, _, role = name.partition("-")
        secrets = {secret for secret, _ in _of_pod(pod_of(each)["spec"])}
        if service not in {"gateway", "billing", "email"}:
            assert not secrets
            continue
        assert all(secret.startswith(f"taskmesh-{service}") for secret in secrets), name
        assert (f"taskmesh-{service}-setup" in secrets) is (role == "setup"), name
