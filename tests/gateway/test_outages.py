"""What callers see when PostgreSQL is away, and that nothing is half-done."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, text

import gateway
from gateway import ledger
from gateway.models import tasks
from gateway.transactions import open_engine, transaction
from taskmesh import database
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState
from taskmesh.errors import DatabaseUnavailable
from taskmesh.outbox import outbox
from taskmesh.parts.postgres import Postgres

MIGRATIONS = Path(gateway.__file__).parent / "migrations"
REQUEST = {"type": "greeter.person.greet", "payload": {"name": "Ada"}}


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that this test may kill; durable, because what was accepted must survive that."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder) / "postgres")
        server.start()
        try:
            yield server
        finally:
            server.purge()


async def test_a_database_that_is_killed_is_503_until_it_is_back_and_no_accepted_task_is_lost(
    own_postgres, serve_gateway, eventually
):
    await asyncio.to_thread(database.migrate, own_postgres.url, scripts=MIGRATIONS)
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(serve_gateway(own_postgres.url))
        await api.announce()
        accepted = await api.submit()
        waiting = asyncio.create_task(
            api.http.post("/v1/tasks", json=REQUEST, headers={"Prefer": "wait=30", "Idempotency-Key": "waits"})
        )
        await eventually(lambda: api.app.state.gateway.doorbell._waiting)

        await asyncio.to_thread(own_postgres.kill)

        given_up = await waiting
        assert given_up.status_code == 202, "it was committed before the database went"
        for method, path, body in (
            ("POST", "/v1/tasks", REQUEST),
            ("POST", "/v1/tasks:batchCreate", {"tasks": [REQUEST]}),
            ("GET", "/v1/tasks", None),
            ("GET", f"/v1/tasks/{accepted['id']}", None),
            ("GET", f"/v1/tasks/{accepted['id']}/events", None),
            ("GET", "/v1/types", None),
            ("GET", "/v1/schedules", None),
            ("GET", "/readyz", None),
        ):
            refused = await api.http.request(method, path, **({"json": body} if body else {}))
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable"), (path, refused.text)
            assert int(refused.headers["retry-after"]) >= 1
        assert (await api.http.get("/livez")).status_code == 200

        await asyncio.to_thread(own_postgres.start)

        await eventually(lambda: is_ready(api))
        again = await api.http.post("/v1/tasks", json=REQUEST, headers={"Idempotency-Key": "waits"})
        assert again.json()["id"] == given_up.json()["id"]
        assert (await api.http.get(f"/v1/tasks/{accepted['id']}")).json() == accepted
        await api.engine.dispose()
        async with transaction(api.engine) as connection:
            for table in (tasks, outbox):
                assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == 2


async def is_ready(api) -> bool:
    return (await api.http.get("/readyz")).status_code == 200


async def test_no_free_connection_is_503_and_not_a_wait_without_end(gateway_url, serve_gateway):
    async with serve_gateway(gateway_url, database_pool_size=1, database_wait_seconds=0.2) as api:
        await api.announce()
        await api.submit()
        async with api.app.state.gateway.engine.begin() as connection:
            await connection.execute(text("select 1"))

            refused = await api.http.post("/v1/tasks", json=REQUEST)

        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert (await api.http.post("/v1/tasks", json=REQUEST)).status_code == 202


async def test_a_connection_that_is_cut_during_the_commit_leaves_all_or_nothing(api, monkeypatch):
    submit = ledger.submit

    async def cut(connection, new):
        await submit(connection, new)
        async with api.engine.begin() as admin:
            pid = (await connection.execute(text("select pg_backend_pid()"))).scalar_one()
            await admin.execute(text("select pg_terminate_backend(:pid)"), {"pid": pid})

    monkeypatch.setattr(ledger, "submit", cut)
    refused = await api.http.post("/v1/tasks", json=REQUEST, headers={"Idempotency-Key": "once"})
    monkeypatch.setattr(ledger, "submit", submit)
    again = await api.http.post("/v1/tasks", json=REQUEST, headers={"Idempotency-Key": "once"})

    assert (refused.status_code, again.status_code) == (503, 202)
    async with api.engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(tasks))).scalar_one() == 1


async def test_nothing_listens_where_the_database_should_be():
    engine = open_engine(SecretStr("postgresql://x:x@127.0.0.1:1/x"), pool_size=1, wait_seconds=1, role="test")

    with pytest.raises(DatabaseUnavailable) as raised:
        async with transaction(engine):
            pass

    assert raised.value.retry_after is not None
    await engine.dispose()


async def test_an_error_that_will_not_pass_is_not_called_an_outage(gateway_engine):
    from sqlalchemy.exc import ProgrammingError

    with pytest.raises(ProgrammingError):
        async with transaction(gateway_engine) as connection:
            await connection.execute(text("select * from no_such_table"))


async def test_a_broker_that_is_away_is_of_no_concern(api):
    """The api process was given the address of a broker that does not exist, and never asks for it."""
    view = await api.submit()

    async with api.engine.begin() as connection:
        await ledger.advance(
            connection,
            [
                LifecycleEvent(
                    task_id=UUID(view["id"]),
                    type=view["type"],
                    state=TaskState.SUCCEEDED,
                    at=datetime.now(UTC),
                    service="greeter",
                )
            ],
        )
    assert (await api.http.get(f"/v1/tasks/{view['id']}")).json()["state"] == "succeeded"
