"""The two hops between transactions: the relay publishes an outbox, the projector writes reports into the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from uuid import UUID

import pika
import psycopg

from meshbench.contest import CPU, RATE, Column, Measured, Turn
from meshbench.figures import Figures
from meshbench.mesh import BEHIND, Mesh, count
from meshbench.pipelined import Pipeline
from meshbench.processes import Meter, until
from meshbench.stage import Stage
from noop_service import DoNothing
from taskmesh import exchanges, lifecycle
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState

BATCH = 500
"""Rows that the relay claims at a time."""
PARCEL = 200
"""Reports that it puts into one message."""


def relay(stage: Stage) -> list[Measured]:
    """A full outbox, the database alone, the broker alone."""
    mesh = stage.mesh("prefork")
    mesh.stop(*BEHIND)
    mesh.start("api", "relay")
    contestants: dict[str, Turn] = {
        "relay": lambda: _relay_turn(mesh, 2 * stage.tasks),
        "PostgreSQL alone: claim and delete 500 at a time": lambda: _delete_turn(mesh, 2 * stage.tasks),
        "RabbitMQ alone: pika, 500 unconfirmed": lambda: _publish_turn(mesh, 2 * stage.tasks),
    }
    turns = stage.contest(contestants)
    columns = [RATE, CPU, Column(figure="cpu.own", title="of it own process", digits=2)]
    return [Measured(case="relay", title="Publish from a full outbox", columns=columns, turns=turns, ours="relay")]


def projector(stage: Stage) -> list[Measured]:
    """Reports of finished tasks, and a COPY of the rows that they lead to."""
    mesh = stage.mesh("prefork")
    mesh.stop(*BEHIND)
    mesh.start("api", "projector")
    contestants: dict[str, Turn] = {
        "projector": lambda: _project_turn(mesh, 2 * stage.tasks),
        "PostgreSQL alone: COPY of the same rows": lambda: _copy_turn(mesh, 2 * stage.tasks),
    }
    turns = stage.contest(contestants)
    columns = [RATE, CPU, Column(figure="cpu.own", title="of it own process", digits=2)]
    note = "A report changes a task's row and adds one to its timeline; COPY writes both, with the same indexes."
    return [
        Measured(
            case="projector",
            title="Reports of finished tasks into the ledger",
            columns=columns,
            turns=turns,
            ours="projector",
            note=note,
        )
    ]


class _Alone:
    """What the servers cost and this very process, whose descendants are everything else."""

    def __init__(self, mesh: Mesh) -> None:
        self._meter = Meter(mesh.ground.roots())
        self._used = 0.0

    def begin(self) -> None:
        self._meter.begin()
        self._used = time.process_time()

    def figures(self, count: int) -> dict[str, float]:
        own = time.process_time() - self._used
        figures = self._meter.figures(count, own=own)
        return figures | {"cpu": figures["cpu"] + figures["cpu.own"]}


def _relay_turn(mesh: Mesh, rows: int) -> Figures:
    mesh.clear()
    role = mesh.roles["relay"]
    meter = Meter({"own": role.pid} | dict(mesh.ground.roots()))
    with role.paused():
        mesh.fill(rows)
        meter.begin()
        begun = time.monotonic()
    mesh.until_published()
    seconds = time.monotonic() - begun
    figures = meter.figures(rows)
    mesh.clear()
    return {"rate": rows / seconds, **figures}


def _delete_turn(mesh: Mesh, rows: int) -> Figures:
    mesh.clear()
    meter = _Alone(mesh)
    with mesh.roles["relay"].paused():
        mesh.fill(rows)
        meter.begin()
        begun = time.monotonic()
        with mesh.gateway_database() as database:
            left = rows
            while left:
                with database.transaction():
                    claimed = database.execute(
                        "select * from outbox where due_at <= now() order by due_at, id limit %s"
                        " for update skip locked",
                        [BATCH],
                    ).fetchall()
                    database.execute("delete from outbox where id = any(%s)", [[row[0] for row in claimed]])
                left -= len(claimed)
        seconds = time.monotonic() - begun
        figures = meter.figures(rows)
    mesh.clear()
    return {"rate": rows / seconds, **figures}


def _publish_turn(mesh: Mesh, rows: int) -> Figures:
    mesh.clear()
    meter = _Alone(mesh)
    pipeline = Pipeline(
        mesh.place.amqp_url,
        exchange=exchanges.COMMANDS,
        routing_key=DoNothing.type_name,
        body=b"x" * 150,
        messages=rows,
    )
    meter.begin()
    begun = time.monotonic()
    pipeline.run()
    seconds = time.monotonic() - begun
    figures = meter.figures(rows)
    mesh.clear()
    return {"rate": rows / seconds, **figures}


def _project_turn(mesh: Mesh, events: int) -> Figures:
    role = mesh.roles["projector"]
    ids = _accepted(mesh, events)
    meter = Meter({"own": role.pid} | dict(mesh.ground.roots()))
    with role.paused(), pika.BlockingConnection(pika.URLParameters(mesh.place.amqp_url)) as connection:
        channel = connection.channel()
        for body in _reports(ids):
            key = f"task.{TaskState.SUCCEEDED}.bench"
            channel.basic_publish(exchanges.LIFECYCLE, key, body, pika.BasicProperties(delivery_mode=2))
        connection.process_data_events(0)
        meter.begin()
        begun = time.monotonic()
    with mesh.gateway_database() as ledger:
        until(lambda: count(ledger, "select count(*) from tasks where state = 'succeeded'") == events)
    seconds = time.monotonic() - begun
    return {"rate": events / seconds, **meter.figures(events)}


def _copy_turn(mesh: Mesh, events: int) -> Figures:
    _accepted(mesh, events)
    with mesh.gateway_database() as ledger:
        kept = {table: _copy_out(ledger, table) for table in ("tasks", "task_events")}
        for table in kept:
            ledger.execute(f"drop table if exists copied_{table}".encode())
            ledger.execute(f"create table copied_{table} (like {table} including all)".encode())
        meter = _Alone(mesh)
        meter.begin()
        begun = time.monotonic()
        with ledger.transaction(), ledger.cursor() as cursor:
            for table, rows in kept.items():
                with cursor.copy(f"copy copied_{table} from stdin".encode()) as copy:
                    copy.write(rows)
        seconds = time.monotonic() - begun
        figures = meter.figures(events)
        for table in kept:
            ledger.execute(f"drop table copied_{table}".encode())
    return {"rate": events / seconds, **figures}


def _accepted(mesh: Mesh, tasks: int) -> list[UUID]:
    """The ids of so many new tasks, of which nobody has heard but the ledger."""
    mesh.clear()
    mesh.fill(tasks)
    with mesh.gateway_database() as ledger:
        ledger.execute("truncate outbox")
        return [row[0] for row in ledger.execute("select id from tasks").fetchall()]


def _copy_out(ledger: psycopg.Connection, table: str) -> bytes:
    with ledger.cursor() as cursor, cursor.copy(f"copy {table} to stdout".encode()) as copy:
        return b"".join(bytes(part) for part in copy)


def _reports(ids: Sequence[UUID]) -> Iterator[bytes]:
    now = datetime.now(UTC)
    for start in range(0, len(ids), PARCEL):
        yield lifecycle.encode(
            [
                LifecycleEvent(
                    task_id=each,
                    type=DoNothing.type_name,
                    state=TaskState.SUCCEEDED,
                    at=now,
                    started_at=now,
                    service="bench",
                    root_id=each,
                    worker="bench:1",
                )
                for each in ids[start : start + PARCEL]
            ]
        )
