"""What the tests of deploy/observability share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from taskmesh_observability import rules, telemetry_table

ROOT = Path(__file__).resolve().parents[2]


def program(name):
    """Where a program of Debian's package `prometheus` is; a laptop may be without it, CI may not."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is missing: apt-get install prometheus")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install prometheus)")
    return path


@pytest.fixture(scope="session")
def promtool():
    """Run promtool; its answer has everything that it said."""
    path = program("promtool")

    def run(*words):
        command = [path, *map(str, words)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def telemetry_page():
    return (ROOT / "docs" / "telemetry.md").read_text()


@pytest.fixture(scope="session")
def exported(telemetry_page):
    """Every series that the mesh exports, with its labels."""
    return telemetry_table.series(telemetry_page)


@pytest.fixture(scope="session")
def known(exported):
    """Those, and what the rules record of them."""
    return rules.with_recorded(exported, rules.rules())


@pytest.fixture(scope="session")
def prometheus():
    """Where the server's program is."""
    return program("prometheus")
