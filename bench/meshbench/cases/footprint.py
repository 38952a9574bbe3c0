"""What each role costs before it has done anything: time to start, processor time when idle, memory."""

from __future__ import annotations

import time

from meshbench.contest import Column, Measured
from meshbench.figures import Figures
from meshbench.mesh import ROLES
from meshbench.processes import MIB, Meter, memory
from meshbench.stage import Stage

ROUNDS = 2
"""Starting all roles takes long, and always about as long."""
SETTLING_SECONDS = 2
IDLE_SECONDS = 10


def footprint(stage: Stage) -> list[Measured]:
    """Every role started alone, and then all of them left to themselves."""
    mesh = stage.mesh("prefork")
    mesh.clear()
    turns: dict[str, list[Figures]] = {name: [] for name in (*ROLES, *stage.ground.roots())}
    idle_seconds = 1 if stage.sizes.quick else IDLE_SECONDS
    for _ in range(1 if stage.sizes.quick else ROUNDS):
        mesh.stop()
        started = {}
        for name in ROLES:
            begun = time.monotonic()
            mesh.start(name)
            started[name] = time.monotonic() - begun
        # What a start leaves to be done has nothing to do with being idle.
        time.sleep(SETTLING_SECONDS)
        meter = Meter(mesh.roots(*ROLES))
        meter.begin()
        time.sleep(idle_seconds)
        for name, seconds in meter.cpu().items():
            held = memory(meter.roots[name])
            figures = {
                "idle": 100 * seconds / idle_seconds,
                "rss": held.resident / MIB,
                "pss": held.proportional / MIB,
            }
            if name in started:
                figures["ready"] = started[name]
            turns[name].append(figures)
    # They would find fault with what other cases do to the ledger.
    mesh.stop("scheduler", "reconciler")
    whole = [
        {figure: sum(each[figure] for each in every) for figure in every[0]}
        for every in zip(*(turns[name] for name in ROLES), strict=True)
    ]
    return [
        Measured(
            case="footprint",
            title="Start-up, idle processor time and memory of each role",
            columns=[
                Column(figure="ready", title="s to ready", digits=2),
                Column(figure="idle", title="% of a core, idle", digits=2),
                Column(figure="rss", title="RSS MiB"),
                Column(figure="pss", title="PSS MiB"),
            ],
            turns=turns | {"all roles": whole},
            note="The worker has a pool of two processes: its memory is that of three.",
        )
    ]
