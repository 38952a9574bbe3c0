"""Read one task, and a filtered page, in a small ledger and in a large one."""

from __future__ import annotations

from functools import partial

import psycopg

from meshbench.contest import CPU, RATE, Column, Measured, Turn, milliseconds
from meshbench.figures import Figures
from meshbench.load import Load, apply_apart
from meshbench.mesh import BEHIND, Mesh
from meshbench.processes import Meter
from meshbench.stage import Stage
from noop_service import DoNothing

SMALL_ROWS = 10_000
PATHS = 500
CONNECTIONS = 4
FAILED_SHARE = 0.01

FILL = """
insert into tasks (id, type, state, attempt, service, payload, result, root_id, tags, created_at, queued_at, started_at,
                   finished_at, updated_at, trace_id, span_id)
select id, %(type)s, case when number %% %(every)s = 0 then 'failed' else 'succeeded' end, 1, 'bench',
       jsonb_build_object('name', repeat('x', 60)), '{"done": true}', id, '{}', at, at, at, at, at,
       replace(gen_random_uuid()::text, '-', ''), substr(replace(gen_random_uuid()::text, '-', ''), 1, 16)
from (select gen_random_uuid() as id, number, now() - number * interval '1 second' as at
      from generate_series(1, %(rows)s) as number) as made
"""
TIMELINE = """
insert into task_events (task_id, root_id, state, attempt, at)
select id, root_id, told.state, 1, created_at from tasks, (values ('queued'), ('succeeded')) as told (state)
"""


def reading(stage: Stage) -> list[Measured]:
    """Both ledgers in turns."""
    small, large = stage.mesh("threads"), stage.mesh("prefork")
    ledgers = {SMALL_ROWS: small, stage.sizes.rows: large}
    paths = {}
    for rows, mesh in ledgers.items():
        mesh.stop(*BEHIND, "scheduler", "reconciler")
        mesh.start("api")
        mesh.clear()
        with mesh.gateway_database() as ledger:
            _grow(ledger, rows)
            # Ids are random here, so the first ones lie anywhere in time.
            found = ledger.execute("select id from tasks order by id limit %s", [PATHS])
            paths[rows] = tuple(f"/v1/tasks/{row[0]}" for row in found.fetchall())
    page = (f"/v1/tasks?type={DoNothing.type_name}&state=failed&limit=50",)
    made = []
    for case, title, asked in (
        ("read-task", "Read one task", paths),
        ("read-page", "Read the newest 50 of the failed tasks of a type", dict.fromkeys(ledgers, page)),
    ):
        contestants: dict[str, Turn] = {
            f"ledger of {rows:,}": partial(_turn, stage, mesh, asked[rows]) for rows, mesh in reversed(ledgers.items())
        }
        turns = stage.contest(contestants)
        made.append(
            Measured(
                case=case,
                title=f"{title}, {CONNECTIONS} connections",
                columns=[
                    milliseconds("p50", "p50", 2),
                    milliseconds("p99", "p99", 2),
                    RATE,
                    CPU,
                    Column(figure="cpu.postgres", title="of it PostgreSQL", digits=2),
                ],
                turns=turns,
                ours=f"ledger of {stage.sizes.rows:,}",
            )
        )
    for mesh in ledgers.values():
        mesh.clear()
    return made


def _grow(ledger: psycopg.Connection, rows: int) -> None:
    values = {"type": DoNothing.type_name, "rows": rows, "every": round(1 / FAILED_SHARE)}
    ledger.execute(FILL, values)
    ledger.execute(TIMELINE)
    ledger.execute("vacuum analyze tasks, task_events")


def _turn(stage: Stage, mesh: Mesh, paths: tuple[str, ...]) -> Figures:
    meter = Meter(mesh.roots("api"))
    meter.begin()
    load = Load(
        port=mesh.port, method="GET", paths=paths, headers=mesh.headers, connections=CONNECTIONS, seconds=stage.seconds
    )
    outcome = apply_apart(load)
    return {"rate": outcome.rate, **outcome.latency, **meter.figures(outcome.count, generator=outcome.cpu_seconds)}
