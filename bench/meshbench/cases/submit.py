"""Submit one task, and have it accepted: the greatest rate, and what it is like at a rate that everybody can take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from meshbench.contest import CPU, RATE, Column, Measured, Turn, milliseconds
from meshbench.figures import Figures
from meshbench.load import Load, Outcome, apply_apart
from meshbench.mesh import BEHIND, purge
from meshbench.processes import Meter, Role
from meshbench.stage import Rival, Stage
from meshbench.submissions import BATCH, in_batches, one_by_one

OURS = "Taskmesh"
WHOLE = "Taskmesh, the whole mesh at work"
ECHO = "bare FastAPI echo"
CELERY = "FastAPI sync + Celery send_task"
TASKIQ = "FastAPI + TaskIQ (aio-pika)"
PROCRASTINATE = "FastAPI + Procrastinate"

RATE_FOR_ALL = 300.0
"""Requests a second at which latency is measured: within what each contestant can do on two cores."""

Loads = Callable[[int, tuple[str, ...]], list[Load]]
"""What is sent to a port, one load after the other, by someone with these headers."""


def submit(stage: Stage) -> list[Measured]:
    """One task in each request."""

    def loads(port: int, headers: tuple[str, ...]) -> list[Load]:
        return [
            one_by_one(port, headers, seconds=stage.seconds),
            one_by_one(port, headers, seconds=stage.seconds / 2, rate=RATE_FOR_ALL),
        ]

    with _contestants(stage, loads, tasks_in_request=1) as contestants:
        turns = stage.contest(contestants)
    return [
        Measured(
            case="submit",
            title="Submit one task, 64 connections, 0.5 KiB",
            columns=[
                RATE,
                milliseconds("p50", "p50"),
                milliseconds("p99", "p99"),
                milliseconds("fixed.p50", f"p50 at {RATE_FOR_ALL:.0f}/s"),
                milliseconds("fixed.p99", f"p99 at {RATE_FOR_ALL:.0f}/s"),
                CPU,
                Column(figure="cpu.server", title="of it server", digits=2),
                Column(figure="mib.server", title="server MiB"),
            ],
            turns=turns,
            ours=OURS,
            note=(
                "Nothing works off what is accepted, but in the second line: there relays, projector and worker share "
                "the two cores, too. "
                f"At {RATE_FOR_ALL:.0f} requests a second latency is counted from when each request was due."
            ),
        )
    ]


def submit_batch(stage: Stage) -> list[Measured]:
    """500 tasks in each request."""

    def loads(port: int, headers: tuple[str, ...]) -> list[Load]:
        return [in_batches(port, headers, seconds=stage.seconds)]

    with _contestants(stage, loads, tasks_in_request=BATCH, whole=False) as contestants:
        turns = stage.contest(contestants)
    return [
        Measured(
            case="batch",
            title="Submit 500 tasks in one request, 4 connections",
            columns=[
                RATE,
                milliseconds("p50", "request p50", 0),
                milliseconds("p99", "request p99", 0),
                CPU,
                Column(figure="cpu.server", title="of it server", digits=2),
                Column(figure="mib.server", title="server MiB"),
            ],
            turns=turns,
            ours=OURS,
            note="Celery and TaskIQ have no batches: they publish 500 messages, TaskIQ all at once.",
        )
    ]


@contextlib.contextmanager
def _contestants(
    stage: Stage, loads: Loads, *, tasks_in_request: int, whole: bool = True
) -> Iterator[Mapping[str, Turn]]:
    measure = partial(_turn, tasks_in_request=tasks_in_request)
    alone = stage.mesh("prefork" if stage.sizes.quick else "threads")
    alone.stop(*BEHIND)
    alone.start("api")
    contestants: dict[str, Turn] = {
        OURS: lambda: measure(
            loads(alone.port, alone.headers),
            {"server": alone.roles["api"].pid} | dict(stage.ground.roots()),
            clear=alone.clear,
        )
    }
    if whole and not stage.sizes.quick:
        busy = stage.mesh("prefork")
        busy.start("api", *BEHIND)
        contestants[WHOLE] = lambda: measure(
            loads(busy.port, busy.headers),
            {"server": busy.roles["api"].pid} | busy.roots(*BEHIND),
            clear=busy.clear,
        )
    rivals = []
    try:
        for name, module in (
            (ECHO, "echo"),
            (CELERY, "celery_route"),
            (TASKIQ, "taskiq_route"),
            (PROCRASTINATE, "procrastinate_route"),
        ):
            rival = Rival(stage.ground, module)
            rivals.append(rival)
            if name == PROCRASTINATE:
                rival.run("-m", "meshbench.rivals.procrastinate_tasks", "setup")
            server = rival.serve(f"meshbench.rivals.{module}")
            contestants[name] = partial(_rival_turn, rival, server, loads, tasks_in_request)
        for rival in rivals:
            rival.wait_until_ready()
        yield contestants
    finally:
        for rival in rivals:
            rival.stop()


def _turn(loads: list[Load], roots: Mapping[str, int], *, clear: Callable[[], None], tasks_in_request: int) -> Figures:
    """Send the loads; the first is what the rate and the costs are of, the second has a fixed rate."""
    meter = Meter(roots)
    meter.begin()
    first = apply_apart(loads[0])
    figures = _figures(first, meter, tasks_in_request)
    clear()
    for load in loads[1:]:
        fixed = apply_apart(load)
        figures |= {f"fixed.{name}": value for name, value in fixed.latency.items()}
        clear()
    return figures


def _figures(outcome: Outcome, meter: Meter, tasks_in_request: int) -> dict[str, float]:
    tasks = outcome.count * tasks_in_request
    costs = meter.figures(tasks, generator=outcome.cpu_seconds)
    return {"rate": tasks / outcome.seconds, **outcome.latency, **costs}


def _rival_turn(rival: Rival, server: Role, loads: Loads, tasks_in_request: int) -> Figures:
    roots = rival.roots(server=server)
    return _turn(loads(server.port(), ()), roots, clear=partial(_clear, rival), tasks_in_request=tasks_in_request)


def _clear(rival: Rival) -> None:
    purge(rival.place, "rival")
    with rival.database() as database:
        if database.execute("select to_regclass('procrastinate_jobs')").fetchone() != (None,):
            database.execute("truncate procrastinate_jobs cascade")
