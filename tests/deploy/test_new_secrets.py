"""`deploy/k8s/new-secrets` makes up passwords once, so that whoever uses one and whoever checks it are told the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from manifests import Documents, Resource, named, of_kind

from .conftest import K8S
from .test_secret_keys import read_keys

TO_BE_MADE_ELSEWHERE = {"taskmesh-keda-gateway", "taskmesh-rabbitmq-tls"}


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    return Path(shutil.copytree(K8S, tmp_path / "k8s"))


@pytest.fixture
def made(manifests: Path, tmp_path: Path) -> Documents:
    """The Secrets of production with a worker of its own."""
    (tmp_path / "ca.crt").write_text("the authority")
    subprocess.run([sys.executable, manifests / "new-worker", "production", "greetings"], check=True)
    words = [
        "production",
        "--ca",
        tmp_path / "ca.crt",
        "--objects",
        "s3://documents/mesh",
        "--smtp",
        "smtps://relay:465",
    ]
    answer = subprocess.run([sys.executable, manifests / "new-secrets", *words], capture_output=True, check=True)
    return list(yaml.safe_load_all(answer.stdout))


def values(made: Documents, name: str) -> dict[str, str]:
    found: dict[str, str] = named(made, "Secret", f"taskmesh-{name}")["stringData"]
    return found


def test_every_key_that_production_reads_is_there_but_for_two_secrets(made, production):
    keys = {(each["metadata"]["name"], key) for each in made for key in each["stringData"]}
    of_the_new_worker = {(name, key) for name, key in keys if "greetings" in name}

    assert keys - of_the_new_worker == {
        (name, key) for name, key in read_keys(production) if name not in TO_BE_MADE_ELSEWHERE
    }
    assert {name for name, _ in of_the_new_worker} == {
        f"taskmesh-{name}"
        for name in (
            "greetings",
            "greetings-setup",
            "greetings-db",
            "greetings-db-owner",
            "rabbitmq-greetings",
            "rabbitmq-greetings-setup",
        )
    }


@pytest.mark.parametrize("service", ["gateway", "billing", "email", "greetings"])
def test_urls_have_the_users_and_passwords_that_the_operators_are_told(made, service):
    for reader, key, told in (
        (service, "TASKMESH_DATABASE_URL", f"{service}-db"),
        (f"{service}-setup", "TASKMESH_DATABASE_URL", f"{service}-db-owner"),
        (service, "TASKMESH_AMQP_URL", f"rabbitmq-{service}"),
        (f"{service}-setup", "TASKMESH_AMQP_URL", f"rabbitmq-{service}-setup"),
        (f"{service}-setup", "TASKMESH_MANAGEMENT_URL", f"rabbitmq-{service}-setup"),
    ):
        url = urlsplit(values(made, reader)[key])
        assert {"username": url.username, "password": url.password} == values(made, told)


def test_databases_are_asked_for_their_certificate_under_a_name_that_is_in_it(made, production):
    for service in ("gateway", "billing", "email"):
        names = named(production, "Cluster", f"{service}-db")["spec"]["certificates"]["serverAltDNSNames"]
        url = urlsplit(values(made, service)["TASKMESH_DATABASE_URL"])
        assert url.hostname in names
        assert url.query == "sslmode=verify-full&sslrootcert=/run/ca/ca.crt"


def test_no_two_passwords_are_the_same(made):
    passwords = [each["stringData"]["password"] for each in made if "password" in each["stringData"]]

    assert len(set(passwords)) == len(passwords)


def test_the_topology_operator_may_read_its_users(made):
    users: list[Resource] = [
        each for each in of_kind(made, "Secret") if each["metadata"]["name"].startswith("taskmesh-rabbitmq-")
    ]

    assert users
    assert all(each["metadata"]["labels"]["rabbitmq.com/topology-operator"] == "true" for each in users)
