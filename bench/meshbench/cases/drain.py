"""Work off a queue that was full before anybody began."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from uuid import uuid4

import dramatiq
from celery import Celery
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from procrastinate import App, PsycopgConnector

from meshbench.contest import CPU, RATE, Column, Measured, Turn
from meshbench.figures import Figures
from meshbench.mesh import BEHIND, Mesh, count, purge
from meshbench.processes import Meter, Role, until
from meshbench.stage import Rival, Stage

POOLS = {"prefork": "2", "threads": "8"}
DRAMATIQ = {"prefork": ("2", "8"), "threads": ("1", "8")}
"""Processes, and threads in each: what it takes by itself on two cores, and one process of as many threads."""


def drain(stage: Stage) -> list[Measured]:
    """With a pool of two processes, then with one of eight threads."""
    return [_drain(stage, pool) for pool in POOLS if pool == "prefork" or not stage.sizes.quick]


def _drain(stage: Stage, pool: str) -> Measured:
    ours = f"Taskmesh, {pool} {POOLS[pool]}"
    with _contestants(stage, pool, ours) as contestants:
        turns = stage.contest(contestants)
    return Measured(
        case=f"drain-{pool}",
        title=f"No-op task from a full queue, pool {pool} {POOLS[pool]}",
        columns=[
            RATE,
            Column(figure="known", title="known to the ledger per second"),
            CPU,
            Column(figure="cpu.worker", title="of it worker", digits=2),
            Column(figure="mib.worker", title="worker MiB"),
        ],
        turns=turns,
        ours=ours,
        note=(
            "Taskmesh leaves each effect once: inbox, effect and report are one transaction; the service's relay and "
            "the gateway's projector run beside the worker, on the same two cores, and are in its CPU seconds. "
            "The others run a task again when its acknowledgement is lost."
        ),
    )


@contextlib.contextmanager
def _contestants(stage: Stage, pool: str, ours: str) -> Iterator[dict[str, Turn]]:
    mesh = stage.mesh(pool)
    mesh.start("api", *BEHIND)
    contestants: dict[str, Turn] = {ours: lambda: mesh_turn(mesh, stage.tasks)}
    with contextlib.ExitStack() as stack:
        celery = Rival(stage.ground, f"celery_{pool}")
        stack.callback(celery.stop)
        worker = start_celery(celery, pool)
        for name, task in (("no database", "nothing"), ("one transaction each", "one_row")):
            turn = partial(_celery_turn, stage, celery, worker, task)
            contestants[f"plain Celery, {pool} {POOLS[pool]}, {name}"] = turn
        processes, threads = DRAMATIQ[pool]
        rival = Rival(stage.ground, f"dramatiq_{pool}")
        stack.callback(rival.stop)
        words = ["-m", "dramatiq", "meshbench.rivals.dramatiq_tasks", "--processes", processes, "--threads", threads]
        actors = rival.start(words)
        contestants[f"Dramatiq, {processes} x {threads} threads, one transaction each"] = partial(
            _dramatiq_turn, stage, rival, actors
        )
        table = Rival(stage.ground, f"procrastinate_{pool}")
        stack.callback(table.stop)
        takers = start_procrastinate(table, processes, threads)
        contestants[f"Procrastinate, {processes} x {threads} coroutines, one transaction each"] = partial(
            _procrastinate_turn, stage, table, takers
        )
        for each in (celery, rival, table):
            each.wait_until_ready()
        yield contestants


def start_celery(rival: Rival, pool: str) -> Role:
    """A plain Celery worker; it knows the task without a database and the one with a transaction."""
    options = ["--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel", "WARNING"]
    words = ["-m", "celery", "-A", "meshbench.rivals.celery_tasks", "worker", "--pool", pool, "-c", POOLS[pool]]
    return rival.start([*words, *options], name="worker")


def start_procrastinate(rival: Rival, processes: str, coroutines: str) -> Role:
    """A Procrastinate worker with its tables."""
    program = ["-m", "meshbench.rivals.procrastinate_tasks"]
    rival.run(*program, "setup")
    return rival.start([*program, "worker", processes, coroutines], name="worker")


def mesh_turn(mesh: Mesh, tasks: int) -> Figures:
    """Have a mesh work off tasks that its gateway has accepted and published before."""
    mesh.clear()
    worker = mesh.roles["worker"]
    meter = Meter(mesh.roots("worker", "worker-relay", "projector"))
    with mesh.service_database() as service, mesh.gateway_database() as ledger:
        with worker.paused():
            mesh.fill(tasks)
            mesh.until_published()
            assert not count(service, "select count(*) from effects"), "somebody works who should stand still"
            meter.begin()
            begun = time.monotonic()
        until(lambda: count(service, "select count(*) from effects") == tasks, worker.last_words)
        seconds = time.monotonic() - begun
        until(lambda: count(ledger, "select count(*) from tasks where state = 'succeeded'") == tasks)
        known = time.monotonic() - begun
        return {"rate": tasks / seconds, "known": tasks / known, **meter.figures(tasks)}


def _until_effects(rival: Rival, role: Role, tasks: int) -> None:
    with rival.database() as database:
        until(lambda: count(database, "select count(*) from effects") >= tasks, role.last_words)


def _rival_turn(
    rival: Rival, role: Role, tasks: int, *, fill: Callable[[], None], finish: Callable[[], None] | None = None
) -> Figures:
    with rival.database() as database:
        database.execute("truncate effects")
    meter = Meter(rival.roots(worker=role))
    with role.paused():
        fill()
        with rival.database() as database:
            assert not count(database, "select count(*) from effects"), "somebody works who should stand still"
        meter.begin()
        begun = time.monotonic()
    if finish is None:
        _until_effects(rival, role, tasks)
    else:
        finish()
    seconds = time.monotonic() - begun
    return {"rate": tasks / seconds, **meter.figures(tasks)}


def _celery_turn(stage: Stage, rival: Rival, role: Role, task: str) -> Figures:
    tasks = stage.tasks
    done = rival.folder / "finished"
    done.unlink(missing_ok=True)

    def fill() -> None:
        purge(rival.place, "rival")
        # Nobody measures this part, so it need not wait for confirms.
        app = Celery(broker=rival.place.amqp_url, set_as_current=False)
        app.conf.update(task_default_queue="rival", task_default_queue_type="quorum")
        with app.producer_pool.acquire(block=True) as producer:
            for _ in range(tasks):
                app.send_task(task, producer=producer, ignore_result=True)
            app.send_task("finish", [str(done)], producer=producer, ignore_result=True)
        app.close()

    # What leaves nothing is finished when what came last in the queue is, give or take what the pool has in hand.
    finish = (lambda: until(done.exists, role.last_words)) if task == "nothing" else None
    return _rival_turn(rival, role, tasks, fill=fill, finish=finish)


def _dramatiq_turn(stage: Stage, rival: Rival, role: Role) -> Figures:
    tasks = stage.tasks

    def fill() -> None:
        broker = RabbitmqBroker(url=rival.place.amqp_url)
        broker.declare_queue("rival")
        for _ in range(tasks):
            broker.enqueue(
                dramatiq.Message(queue_name="rival", actor_name="one_row", args=(str(uuid4()),), kwargs={}, options={})
            )
        broker.close()

    return _rival_turn(rival, role, tasks, fill=fill)


def _procrastinate_turn(stage: Stage, rival: Rival, role: Role) -> Figures:
    tasks = stage.tasks

    async def fill() -> None:
        app = App(connector=PsycopgConnector(conninfo=rival.place.database_url))
        async with app.open_async():
            await app.configure_task("one_row", queue="rival").batch_defer_async(*[{}] * tasks)

    with rival.database() as database:
        database.execute("truncate procrastinate_jobs cascade")
    return _rival_turn(rival, role, tasks, fill=lambda: asyncio.run(fill()))
