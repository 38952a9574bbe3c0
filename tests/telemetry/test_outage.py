"""The collector is away while the mesh works: no work fails, no process grows, and the log is brief about it.

The outage lasts `TASKMESH_OUTAGE_SECONDS`. What is promised is ten minutes:

    TASKMESH_OUTAGE_SECONDS=600 .venv/bin/python -m pytest tests/telemetry/test_outage.py -s
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from memory import proportional_bytes, resident_bytes
from running_mesh import Mesh, running_mesh
from taskmesh.exporting import REPEAT_SECONDS
from taskmesh.testing.otlp import OtlpSink
from taskmesh.testing.waiting import eventually

OUTAGE_SECONDS = float(os.environ.get("TASKMESH_OUTAGE_SECONDS", "15"))
WARM_UP_SECONDS = max(5.0, OUTAGE_SECONDS / 12)
TASKS_PER_SECOND = 30
CALLERS = 3
GROWTH_MAX_BYTES = 20 * 2**20

pytestmark = pytest.mark.timeout(300 + 2 * OUTAGE_SECONDS)


@dataclass
class Load:
    """Callers that submit tasks at a steady rate until they are told to stop."""

    http: httpx.Client
    statuses: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._submit) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, seconds: float) -> None:
        """Return after so long under load."""
        self._stop.wait(seconds)

    def _submit(self) -> None:
        body = {"type": "orders.order.place", "payload": {"name": "under load"}}
        while not self._stop.wait(CALLERS / TASKS_PER_SECOND):
            self.statuses.append(self.http.post("/v1/tasks", json=body).status_code)


@pytest.fixture
def mesh(postgres: str, rabbitmq: Any, otlp_sink: OtlpSink, tmp_path: Path) -> Iterator[Mesh]:
    roles = ("api", "relay", "projector")
    with running_mesh(postgres, rabbitmq, tmp_path, *roles, endpoint=otlp_sink.endpoint) as mesh:
        yield mesh


def test_an_outage_of_the_collector_harms_nothing(mesh, otlp_sink):
    """Half of it nobody listens where the collector was; then something does, and never answers."""
    mesh.wait_until_announced("orders.order.place")

    with Load(mesh.http) as load:
        load.go_on(WARM_UP_SECONDS)
        warm = memory(mesh)
        otlp_sink.close()
        began = time.monotonic()
        load.go_on(OUTAGE_SECONDS / 2)
        with OtlpSink(otlp_sink.port) as hanging:
            hanging.gate.clear()
            load.go_on(OUTAGE_SECONDS / 2)
            away = memory(mesh)
            seconds = time.monotonic() - began
            hanging.gate.set()
            eventually(lambda: len(messages(mesh, "spans exported again")) >= len(talkative(mesh)))

    eventually(lambda: states(mesh) == {"succeeded": len(load.statuses)})
    report(warm, away, len(load.statuses), seconds)
    assert set(load.statuses) == {202}
    assert away.keys() == warm.keys()
    assert not {name for name in away if away[name][0] - warm[name][0] > GROWTH_MAX_BYTES}
    assert max(talkative(mesh).values()) <= math.ceil(seconds / REPEAT_SECONDS) + 1
    assert not [line for line in mesh.log_lines() if line["level"] == "ERROR"]


def memory(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """Resident and proportional bytes of each process."""
    return {name: (resident_bytes(pid), proportional_bytes(pid)) for name, pid in mesh.processes().items()}


def states(mesh: Mesh) -> dict[str, int]:
    """How many tasks of the ledger are in each state."""
    rows = mesh.gateway.rows("select state, count(*) from tasks group by state")
    return {row["state"]: row["count"] for row in rows}


def messages(mesh: Mesh, message: str) -> list[dict[str, Any]]:
    return [line for line in mesh.log_lines() if line["message"] == message]


def talkative(mesh: Mesh) -> dict[str, int]:
    """How often each process has said that its spans are not exported; at least the API and the pool have."""
    said: dict[str, int] = {}
    for line in messages(mesh, "spans not exported"):
        process = f"{line['service']} {line['role']} {line['pid']}"
        said[process] = said.get(process, 0) + 1
    return said


def report(warm: dict[str, tuple[int, int]], away: dict[str, tuple[int, int]], tasks: int, seconds: float) -> None:
    """Print the figures, for who runs this by hand."""
    lines = [f"{tasks} tasks, collector away for {seconds:.0f} s; MiB resident (proportional), before and at its end"]
    for name, before in warm.items():
        (old, old_part), (new, new_part) = [[size / 2**20 for size in pair] for pair in (before, away[name])]
        lines.append(f"{name:<20} {old:6.1f} ({old_part:5.1f})  {new:6.1f} ({new_part:5.1f})  {new - old:+5.1f}")
    sys.stdout.write("\n".join(["", *lines, ""]))
