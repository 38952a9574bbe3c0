"""The manifests as they are rendered, and the tools that look at them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from manifests import Documents

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
TOOLS = ROOT / ".taskmesh" / "manifest-tools" / "bin"
SCHEMAS = ROOT.parent / "shared" / "crds"


def find(tool: str, *, how: str, also: Path | None = None) -> str:
    """The tool's path. A laptop may do without it, and says so; CI only without what no package brings."""
    found = shutil.which(tool, path=f"{TOOLS}:{os.environ['PATH']}")
    if found is None and "CI" in os.environ and tool not in {"kubectl", "podman"}:
        pytest.fail(f"{tool} is not installed ({how})")
    if found is None:
        pytest.skip(f"{tool} is not installed ({how})")
    return found


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    """Render a folder."""
    kubectl = find("kubectl", how="it is not among Debian's packages of this release; see kubernetes.io")
    return subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)


@cache
def rendered_text(overlay: str) -> str:
    answer = kustomize(K8S / "overlays" / overlay)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@cache
def _documents(overlay: str) -> Documents:
    return [each for each in yaml.load_all(rendered_text(overlay), yaml.CSafeLoader) if each]


@pytest.fixture(scope="session")
def render() -> Callable[[str], Documents]:
    """A copy of an overlay's resources, to be changed at will."""
    return lambda overlay: copy.deepcopy(_documents(overlay))


@pytest.fixture
def production(render) -> Documents:
    return render("production")


@pytest.fixture
def staging(render) -> Documents:
    return render("staging")
