"""Everything renders, without a warning: overlays as they are, and each component alone on the base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from .conftest import K8S, kustomize

COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
BUILT_IN = {"v1", "apps/v1", "batch/v1", "policy/v1", "autoscaling/v2", "networking.k8s.io/v1"}


def faults(folder: Path) -> str:
    """What kustomize says against a folder."""
    answer = kustomize(folder)
    return answer.stderr or ("" if answer.returncode == 0 else "failed")


def folder_with(folder: Path, component: str) -> Path:
    """The base with one component, beside nothing else."""
    base, it = (os.path.relpath(K8S / part, folder) for part in ("base", f"components/{component}"))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "components": [it]}))
    return folder


@pytest.mark.parametrize("overlay", ["local", "staging", "production"])
def test_an_overlay_renders(overlay):
    assert faults(K8S / "overlays" / overlay) == ""


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_renders_alone_on_the_base(tmp_path, component):
    assert faults(folder_with(tmp_path, component)) == ""


def test_every_component_is_an_opt_in_with_a_page_that_says_what_it_is():
    for component in COMPONENTS:
        folder = K8S / "components" / component
        assert yaml.safe_load((folder / "kustomization.yaml").read_text())["kind"] == "Component"
        assert len((folder / "README.md").read_text().splitlines()) <= 20


def test_the_base_needs_nothing_that_is_not_built_in():
    answer = kustomize(K8S / "base")

    assert {each["apiVersion"] for each in yaml.safe_load_all(answer.stdout)} <= BUILT_IN


@pytest.mark.parametrize(
    "line",
    ["patches: [{path: nowhere.yaml}]", "commonLabels: {team: shop}", "resources: [../nowhere]"],
    ids=["missing-file", "deprecated-field", "second-resources"],
)
def test_a_fault_in_a_component_is_caught(tmp_path, line):
    shutil.copytree(K8S / "components" / "hpa", tmp_path / "hpa")
    with (tmp_path / "hpa" / "kustomization.yaml").open("a") as kustomization:
        kustomization.write(line + "\n")
    base = os.path.relpath(K8S / "base", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [hpa]\n")

    assert faults(tmp_path) != ""
