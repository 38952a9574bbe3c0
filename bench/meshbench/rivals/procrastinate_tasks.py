"""Procrastinate: the queue is a PostgreSQL table, and so is what a task leaves.

`python -m meshbench.rivals.procrastinate_tasks setup|worker PROCESSES CONCURRENCY`
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
from uuid import uuid4

import psycopg_pool
from procrastinate import App, PsycopgConnector

from meshbench.rivals import DATABASE_URL, ready

POOL = 20
"""Connections, as many as the gateway's api has."""

app = App(connector=PsycopgConnector(conninfo=DATABASE_URL, min_size=4, max_size=POOL))
effects = psycopg_pool.AsyncConnectionPool(DATABASE_URL, min_size=1, max_size=POOL, open=False)


@app.task(name="one_row", queue="rival")
async def one_row(name: str = "", sent_at: float | None = None) -> None:  # noqa: ARG001 - as the others
    """Leaves one row, in one transaction."""
    async with effects.connection() as connection:
        await connection.execute("insert into effects values (%s, %s)", (uuid4(), sent_at))


async def set_up() -> None:
    """Make the tables."""
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def work(concurrency: int) -> None:
    """Run tasks until told to stop."""
    await effects.open()
    async with app.open_async():
        await app.run_worker_async(concurrency=concurrency)
    await effects.close()


def _process(concurrency: int) -> None:
    asyncio.run(work(concurrency))


def main() -> None:
    """Make the tables, or work in several processes."""
    if sys.argv[1] == "setup":
        asyncio.run(set_up())
        return
    processes, concurrency = int(sys.argv[2]), int(sys.argv[3])
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_process, args=(concurrency,)) for _ in range(processes)]
    for child in children:
        child.start()

    def stop(*_: object) -> None:
        for child in children:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    ready()
    for child in children:
        child.join()


if __name__ == "__main__":
    main()
