"""From the moment at which a task is submitted to the commit of its effect, at fixed rates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import psycopg

from meshbench.cases.drain import start_celery, start_procrastinate
from meshbench.cases.submit import OURS
from meshbench.contest import CPU, Column, Measured, Turn, milliseconds
from meshbench.figures import Figures, latencies
from meshbench.load import apply_apart
from meshbench.mesh import BEHIND, count
from meshbench.processes import Meter, until
from meshbench.stage import Rival, Stage
from meshbench.submissions import one_by_one

RATES = (20, 200)


def latency(stage: Stage) -> list[Measured]:
    """Each contestant with an HTTP server and a worker, which leaves one row."""
    with _contestants(stage) as contestants:
        turns = stage.contest(contestants)
    columns: list[Column] = [
        milliseconds(f"at{rate}.{share}", f"{share} at {rate}/s") for rate in RATES for share in ("p50", "p95", "p99")
    ]
    return [
        Measured(
            case="latency",
            title="Submit to effect, at fixed rates",
            columns=[*columns, CPU],
            turns=turns,
            ours=OURS,
            note=(
                "Counted from when the request was due to the commit of the effect, by PostgreSQL's own record of "
                "commit times. CPU seconds are those at the highest rate."
            ),
        )
    ]


@contextlib.contextmanager
def _contestants(stage: Stage) -> Iterator[Mapping[str, Turn]]:
    mesh = stage.mesh("prefork")
    mesh.start("api", *BEHIND)
    mesh.clear()
    contestants: dict[str, Turn] = {
        OURS: lambda: _turn(
            mesh.service_database,
            stage,
            port=mesh.port,
            roots=mesh.roots("api", *BEHIND),
            headers=mesh.headers,
            clear=mesh.clear,
        )
    }
    with contextlib.ExitStack() as stack:
        celery = Rival(stage.ground, "celery_latency")
        stack.callback(celery.stop)
        worker = start_celery(celery, "prefork")
        server = celery.serve("meshbench.rivals.celery_route")
        contestants["FastAPI + plain Celery, one transaction"] = lambda: _turn(
            celery.database, stage, port=server.port(), roots=celery.roots(worker=worker, api=server)
        )
        table = Rival(stage.ground, "procrastinate_latency")
        stack.callback(table.stop)
        taker = start_procrastinate(table, "2", "8")
        route = table.serve("meshbench.rivals.procrastinate_route")
        contestants["FastAPI + Procrastinate, one transaction"] = lambda: _turn(
            table.database, stage, port=route.port(), roots=table.roots(worker=taker, api=route)
        )
        celery.wait_until_ready()
        table.wait_until_ready()
        yield contestants


def _turn(
    connect: Callable[[], psycopg.Connection],
    stage: Stage,
    *,
    port: int,
    roots: Mapping[str, int],
    headers: tuple[str, ...] = (),
    clear: Callable[[], None] | None = None,
) -> Figures:
    figures: dict[str, float] = {}
    with connect() as database:
        for rate in RATES:
            database.execute("truncate effects")
            meter = Meter(roots)
            meter.begin()
            sent = apply_apart(one_by_one(port, headers, seconds=2 * stage.seconds, rate=rate))
            until(partial(_has_effects, database, sent.count), seconds=60)
            rows = database.execute(
                "select extract(epoch from pg_xact_commit_timestamp(xmin))::float8 - sent_at from effects"
            ).fetchall()
            figures |= latencies([float(row[0]) for row in rows], prefix=f"at{rate}.")
            figures |= meter.figures(sent.count, generator=sent.cpu_seconds)
    if clear:
        clear()
    return figures


def _has_effects(database: psycopg.Connection, number: int) -> bool:
    return count(database, "select count(*) from effects") == number
