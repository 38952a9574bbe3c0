"""The Dockerfiles as they are written, and the program that writes digests into overlays."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib

import pytest

from manifests import images_are_pinned

from .conftest import ROOT

SERVICES = ("gateway", "billing-worker", "email-worker")
PIN = ROOT / "deploy" / "images" / "pin"


@pytest.fixture(params=SERVICES)
def service(request) -> str:
    return request.param


@pytest.fixture
def dockerfile(service) -> str:
    return (ROOT / "services" / service / "Dockerfile").read_text()


def instructions(dockerfile: str, name: str) -> list[str]:
    joined = dockerfile.replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_both_stages_are_built_on_an_image_of_ones_choice(dockerfile):
    assert instructions(dockerfile, "ARG")[0].startswith("PYTHON_IMAGE=")
    assert [each.split()[0] for each in instructions(dockerfile, "FROM")] == ["${PYTHON_IMAGE}"] * 2


def test_an_image_holds_its_own_service_alone(service, dockerfile):
    """What is copied, and what the lock is asked for; tests/architecture walks the lock for what comes with it."""
    copied = " ".join(each for each in instructions(dockerfile, "COPY") if "--from" not in each)
    others = set(SERVICES) - {service}

    assert f"services/{service}" in copied
    assert not [other for other in others if f"services/{other}" in copied]
    syncs = [each for each in instructions(dockerfile, "RUN") if "uv sync" in each]
    assert all(f"--package taskmesh-{service}" in each and "--frozen" in each and "--no-dev" in each for each in syncs)
    assert instructions(dockerfile, "COPY")[-1] == "--from=build /app /app"


def test_the_program_is_the_containers_first_process_and_no_root(service, dockerfile):
    """A shell or an init that passes signals to a whole group would kill the tasks of a worker."""
    package = service.replace("-", "_")
    user, _, group = instructions(dockerfile, "USER")[-1].partition(":")

    assert instructions(dockerfile, "ENTRYPOINT") == [f'["python", "-m", "{package}"]']
    assert int(user) >= 10_000
    assert int(group) >= 10_000


def test_the_lock_is_read_by_the_uv_that_wrote_it(dockerfile):
    bootstrap = (ROOT / "deploy" / "local" / "bootstrap").read_text()
    [version] = re.findall(r"^UV_VERSION=(.+)$", bootstrap, re.MULTILINE)

    assert f"UV_VERSION={version}" in instructions(dockerfile, "ARG")
    assert "UV_COMPILE_BYTECODE=1" in dockerfile
    # Behind a company's own authority its certificate is in the base image, and in no program.
    assert "UV_SYSTEM_CERTS=1" in dockerfile


def test_labels_say_what_it_is(service, dockerfile):
    [labels] = instructions(dockerfile, "LABEL")
    described = tomllib.loads((ROOT / "services" / service / "pyproject.toml").read_text())["project"]["description"]

    for name in ("title", "description", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert described in labels


def test_images_are_pushed_by_the_engine_that_has_built_them(tmp_path, monkeypatch):
    """`build` takes buildah where there is neither docker nor podman."""
    deploy, programs = tmp_path / "deploy", tmp_path / "programs"
    shutil.copytree(PIN.parent, deploy / "images")
    (deploy / "k8s" / "overlays" / "acme" / "images").mkdir(parents=True)
    programs.mkdir()
    digest = f"sha256:{7:064x}"
    (programs / "buildah").write_text(f'#!/bin/sh\n[ "$1" != push ] || echo {digest} >"$3"\n')
    (programs / "buildah").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("REGISTRY", "registry.acme.com/taskmesh")
    monkeypatch.delenv("ENGINE", raising=False)

    runpy.run_path(str(deploy / "images" / "pin"))["main"]("acme")

    written = (deploy / "k8s" / "overlays" / "acme" / "images" / "kustomization.yaml").read_text()
    assert written.count(digest) == len(SERVICES)


def test_whoever_names_no_registry_is_told_which_variable_names_it(monkeypatch):
    monkeypatch.delenv("REGISTRY", raising=False)

    with pytest.raises(SystemExit, match="REGISTRY is not set"):
        runpy.run_path(str(PIN))["main"]("production")


def test_digests_are_written_into_an_overlay(tmp_path, monkeypatch, render):
    """Known ones, in place of what a push would have told."""
    deploy = tmp_path / "deploy"
    shutil.copytree(PIN.parent, deploy / "images")
    (deploy / "k8s" / "overlays" / "acme" / "images").mkdir(parents=True)
    monkeypatch.setenv("REGISTRY", "registry.acme.com/taskmesh")
    digests = {service: f"sha256:{index:064x}" for index, service in enumerate(SERVICES, 1)}
    main = runpy.run_path(str(deploy / "images" / "pin"))["main"]

    main("acme", *(f"{service}={digest}" for service, digest in digests.items()))

    written = (deploy / "k8s" / "overlays" / "acme" / "images" / "kustomization.yaml").read_text()
    for service, digest in digests.items():
        assert (
            f"- name: taskmesh/{service}\n    newName: registry.acme.com/taskmesh/{service}\n    digest: {digest}\n"
            in written
        )
    with pytest.raises(SystemExit):
        main("acme", *(f"{service}=latest" for service in SERVICES))
    assert images_are_pinned(render("production")) == []
