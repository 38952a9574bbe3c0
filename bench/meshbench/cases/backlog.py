"""Submit and work off with many tasks waiting, against the same in an empty mesh."""

from __future__ import annotations

import signal
import time
from functools import partial

from meshbench.cases.drain import mesh_turn
from meshbench.contest import CPU, RATE, Measured, Turn, milliseconds
from meshbench.figures import Figures
from meshbench.load import apply_apart
from meshbench.mesh import BEHIND, Mesh, count, empty
from meshbench.processes import Meter, until
from meshbench.stage import Stage
from meshbench.submissions import one_by_one


def backlog(stage: Stage) -> list[Measured]:
    """Both meshes in turns."""
    waiting = stage.sizes.waiting
    idle, full = stage.mesh("prefork"), stage.mesh("prefork", "backlog")
    for mesh in (idle, full):
        mesh.stop(*BEHIND)
        mesh.start("api")
    full.start("relay")
    full.fill(waiting)
    full.until_published(seconds=waiting / 200)
    full.stop("relay")
    names = {f"{waiting:,} waiting": full, "empty": idle}
    submits: dict[str, Turn] = {name: partial(_submit, stage, mesh, clear=mesh is idle) for name, mesh in names.items()}
    first = stage.contest(submits)
    with full.gateway_database() as ledger:
        # What was submitted meanwhile: a queue takes no more than a million, and the relay would try again and again.
        empty(ledger, "outbox")
    full.start(*BEHIND)
    full.roles["worker"].send(signal.SIGSTOP)
    idle.start(*BEHIND)
    drains: dict[str, Turn] = {
        f"{waiting:,} waiting": lambda: _drain_some(full, stage.tasks),
        "empty": lambda: mesh_turn(idle, stage.tasks),
    }
    second = stage.contest(drains)
    full.roles["worker"].send(signal.SIGCONT)
    full.stop()
    ours = f"{waiting:,} waiting"
    return [
        Measured(
            case="backlog-submit",
            title="Submit one task, with a backlog and without",
            columns=[RATE, milliseconds("p50", "p50"), milliseconds("p99", "p99"), CPU],
            turns=first,
            ours=ours,
        ),
        Measured(
            case="backlog-drain",
            title="Work off tasks, with a backlog and without",
            columns=[RATE, CPU],
            turns=second,
            ours=ours,
        ),
    ]


def _submit(stage: Stage, mesh: Mesh, *, clear: bool) -> Figures:
    meter = Meter(mesh.roots("api"))
    meter.begin()
    outcome = apply_apart(one_by_one(mesh.port, mesh.headers, seconds=stage.seconds))
    figures = meter.figures(outcome.count, generator=outcome.cpu_seconds)
    if clear:
        mesh.clear()
    return {"rate": outcome.rate, **outcome.latency, **figures}


def _drain_some(mesh: Mesh, tasks: int) -> Figures:
    """Let the worker run until it has done so many more; it stands still in between, with its queue as it is."""
    worker = mesh.roles["worker"]
    meter = Meter(mesh.roots("worker", "worker-relay", "projector"))
    with mesh.service_database() as service:
        before = count(service, "select count(*) from effects")
        meter.begin()
        begun = time.monotonic()
        worker.send(signal.SIGCONT)
        until(lambda: count(service, "select count(*) from effects") >= before + tasks, worker.last_words)
        seconds = time.monotonic() - begun
        worker.send(signal.SIGSTOP)
        done = count(service, "select count(*) from effects") - before
        until(lambda: not count(service, "select count(*) from outbox"), mesh.roles["worker-relay"].last_words)
    return {"rate": done / seconds, **meter.figures(done)}
