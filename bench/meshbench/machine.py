"""What figures were measured on: the machine, the versions of what took part, and the commit."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg

from meshbench.ground import Ground
from taskmesh.management import Management

PACKAGES = (
    "fastapi",
    "pydantic",
    "uvicorn",
    "uvloop",
    "sqlalchemy",
    "psycopg",
    "celery",
    "kombu",
    "pika",
    "dramatiq",
    "procrastinate",
    "taskiq",
    "taskiq-aio-pika",
    "aio-pika",
)

CODE = (":/", ":!/bench/results", ":!/docs")
"""Whose changes make a measured commit another one."""


def describe(ground: Ground) -> dict[str, Any]:
    """Everything that a reader has to know to compare these figures with others."""
    with psycopg.connect(ground.postgres.url) as database:
        postgres = database.info.parameter_status("server_version")
    with Management(ground.rabbitmq.management_url) as management:
        broker: Mapping[str, Any] = management.overview()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            "system": f"{platform.system()} {platform.release()}",
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "postgresql": postgres,
            "rabbitmq": broker.get("rabbitmq_version", "unknown"),
            **{name: version(name) for name in PACKAGES},
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.machine()


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
