"""Campaigns against a mesh with a bug in it: each has to be found, and by the right invariant."""

from __future__ import annotations

import asyncio

import pytest
from rich.console import Console

from taskmesh_local.faults.campaign import run
from taskmesh_local.faults.options import Options
from taskmesh_local.faults.planted import Bug

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

SEEDS = (1, 2, 3)

FOUND_BY = {
    Bug.ACK_BEFORE_COMMIT: "every 202 has one outcome",
    Bug.NO_INBOX: "every effect came about once",
    Bug.DELETE_BEFORE_CONFIRM: "every 202 has one outcome",
}


@pytest.mark.parametrize("bug", list(Bug))
def test_a_planted_bug_is_found(bug, tmp_path):
    """Within three seeds, and by the invariant that it breaks."""
    reports = []
    for seed in SEEDS:
        options = Options(
            seed=seed, minutes=1.5, rate=10, count=36, plant=bug, limit_seconds=120, standstill_seconds=20
        )
        reports.append(asyncio.run(run(options, tmp_path / f"mesh-{seed}", Console(width=160))))
        if FOUND_BY[bug] in reports[-1].broken:
            return
    pytest.fail(f"{bug} was not found: {[report.broken for report in reports]}")
