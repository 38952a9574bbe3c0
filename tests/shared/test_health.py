"""What probes read: files whose presence and age say how a role is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taskmesh.health import Health, why_not_alive, why_not_ready


@pytest.fixture
def role(tmp_path: Path) -> Path:
    return tmp_path / "orders-worker"


@pytest.fixture
def health(role: Path) -> Health:
    return Health(role.parent, role.name)


def age(role: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(role.with_name(f"{role.name}.alive"), (moment, moment))


def probe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taskmesh.health", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_a_role_that_has_not_begun_is_neither(role, health):
    assert why_not_alive(role) == "it has not begun, or has ended"
    assert why_not_ready(role) == "it cannot work at the moment"


def test_a_role_that_waits_is_alive_and_not_ready(role, health):
    health.beat()

    assert why_not_alive(role) is None
    assert why_not_ready(role) is not None


def test_a_role_that_works_is_both_until_its_loop_stands_still(role, health):
    health.ready()
    assert why_not_ready(role) is None

    age(role, 61)

    assert "has not turned for 61 s" in (why_not_alive(role) or "")
    assert why_not_ready(role) == why_not_alive(role)


def test_a_role_that_cannot_work_any_more_stays_alive(role, health):
    health.ready()
    health.unready()

    assert why_not_alive(role) is None
    assert why_not_ready(role) is not None


def test_a_new_start_does_not_inherit_the_word_of_a_killed_one(role, health):
    health.ready()

    Health(role.parent, role.name)

    assert why_not_alive(role) is not None
    assert why_not_ready(role) is not None


def test_the_probe_answers_by_its_exit_code_and_gives_the_reason(role, health):
    health.beat()

    assert probe("alive", role).returncode == 0
    not_ready = probe("ready", role)
    assert (not_ready.returncode, not_ready.stdout) == (1, "it cannot work at the moment\n")
    age(role, 10)
    assert probe("alive", role).returncode == 0
    assert probe("alive", role, 5).returncode == 1
    assert probe("awake", role).returncode == 1


def test_the_probe_starts_no_second_copy_of_the_application(role):
    """It loads nothing that is installed, so it costs a fraction of a second of a small pod's processor."""
    code = "import sys, taskmesh.health; print(*(name for name in sys.modules if name.startswith(('celery', 'sqlalchemy', 'pydantic'))))"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert answer.stdout == "\n"
