"""Whoever talks to a database by TLS, as the manifests have it, takes no certificate but the server's own."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import trustme
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from running_mesh import running_mesh
from taskmesh.database import async_engine, migrate, reason_of, sync_engine
from taskmesh.parts.postgres import Postgres, create_database, drop_database
from taskmesh.relay import Relay
from taskmesh.testing.waiting import eventually

SERVICES = Path(__file__).parents[1] / "services"
MINE = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
REFUSED = "SSL error: certificate verify failed"


@dataclass
class Tls:
    """A PostgreSQL that speaks TLS, and two authorities: the one that made its certificate, and another."""

    postgres: Postgres
    known: Path
    other: Path
    database: str = "postgres"

    def url(self, *, authority: Path | None = None, host: str = "localhost") -> str:
        """As a deployment's secret has it."""
        parts = urlsplit(self.postgres.url)
        return urlunsplit(
            parts._replace(
                netloc=parts.netloc.replace("127.0.0.1", host),
                path=f"/{self.database}",
                query=f"sslmode=verify-full&sslrootcert={authority or self.known}",
            )
        )

    def sessions(self, statement: str) -> dict[str, bool]:
        """What a look at all sessions of clients says: their names, and whether each is encrypted."""
        clients = "from pg_stat_activity join pg_stat_ssl using (pid) where backend_type = 'client backend'"
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            return dict(connection.execute(f"select application_name, bool_and(ssl) {clients} {statement}").fetchall())


def servers_with_tls() -> list[Path]:
    """Where there are programs of PostgreSQL that speak TLS; those of the wheel do not."""
    folders = [Path(given)] if (given := os.environ.get("TASKMESH_PG_BIN")) else []
    return folders + sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    """Takes its certificate while it runs, so that it needs no configuration that a deployment would not have."""
    if not (folders := servers_with_tls()):
        how = "no PostgreSQL that speaks TLS is installed: apt-get install postgresql"
        pytest.fail(how) if "CI" in os.environ else pytest.skip(how)
    folder = tmp_path_factory.mktemp("tls")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKMESH_PG_BIN", str(folders[-1]))
        postgres = Postgres(folder / "postgres", durable=False)
        # The wheel's programs come first where none are named.
        postgres.start()
    known, other = trustme.CA(), trustme.CA()
    for name, authority in (("known.crt", known), ("other.crt", other)):
        (folder / name).write_bytes(authority.cert_pem.bytes())
    certificate = known.issue_cert("localhost")
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        [data] = admin.execute("show data_directory").fetchone() or [""]
        settings = {"ssl": "on"}
        for setting, pem in (
            ("ssl_key_file", certificate.private_key_pem),
            ("ssl_cert_file", certificate.cert_chain_pems[0]),
        ):
            file = Path(data) / setting
            file.write_bytes(pem.bytes())
            file.chmod(0o600)
            shutil.chown(file, Path(data).stat().st_uid, Path(data).stat().st_gid)
            settings[setting] = str(file)
        for setting, value in settings.items():
            admin.execute(sql.SQL("alter system set {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
        admin.execute("select pg_reload_conf()")
    eventually(lambda: _is_on(postgres), explain=postgres.log.read_text)
    yield Tls(postgres, folder / "known.crt", folder / "other.crt")
    postgres.purge()


def _is_on(postgres: Postgres) -> bool:
    with psycopg.connect(postgres.url) as connection:
        return connection.execute("show ssl").fetchone() == ("on",)


@pytest.fixture
def tls(server: Tls) -> Iterator[Tls]:
    """The server, with a database for one test."""
    name = f"tls_{token_hex(6)}"
    create_database(server.postgres.url, name)
    yield Tls(server.postgres, server.known, server.other, name)
    drop_database(server.postgres.url, name)


async def by_a_sync_engine(url: str) -> bool:
    engine = sync_engine(url)
    try:
        with engine.connect() as connection:
            return bool(connection.execute(text(MINE)).scalar_one())
    finally:
        engine.dispose()


async def by_an_async_engine(url: str) -> bool:
    engine = async_engine(url)
    try:
        async with engine.connect() as connection:
            return bool((await connection.execute(text(MINE))).scalar_one())
    finally:
        await engine.dispose()


WAYS = [by_a_sync_engine, by_an_async_engine]


@pytest.mark.parametrize("connect", WAYS)
async def test_an_engine_is_encrypted_once_the_server_has_shown_its_certificate(
    tls: Tls, connect: Callable[[str], Awaitable[bool]]
):
    assert await connect(tls.url())


@pytest.mark.parametrize("connect", WAYS)
async def test_an_engine_refuses_a_certificate_of_another_authority_and_says_so(
    tls: Tls, connect: Callable[[str], Awaitable[bool]]
):
    with pytest.raises(OperationalError) as refused:
        await connect(tls.url(authority=tls.other))

    assert REFUSED in reason_of(refused.value)


@pytest.mark.parametrize("connect", WAYS)
async def test_an_engine_refuses_a_certificate_that_is_made_out_to_another_host_and_says_so(
    tls: Tls, connect: Callable[[str], Awaitable[bool]]
):
    with pytest.raises(OperationalError) as refused:
        await connect(tls.url(host="127.0.0.1"))

    assert 'server certificate for "localhost" does not match host name "127.0.0.1"' in reason_of(refused.value)


def test_a_ca_file_that_is_not_mounted_is_named(tls: Tls, tmp_path: Path):
    with pytest.raises(OperationalError) as refused:
        migrate(tls.url(authority=tmp_path / "nowhere.crt"), scripts=None)

    assert f'root certificate file "{tmp_path / "nowhere.crt"}" does not exist' in reason_of(refused.value)


async def test_a_relay_that_distrusts_its_database_says_why_and_goes_on_trying(tls: Tls, broker, caplog):
    caplog.set_level(logging.WARNING, "taskmesh.relay")
    engine, stop = async_engine(tls.url(authority=tls.other)), asyncio.Event()
    relaying = asyncio.create_task(Relay(engine, broker.amqp_url, "tls").run(stop))

    await asyncio.to_thread(eventually, lambda: caplog.records)

    assert REFUSED in caplog.records[0].__dict__["reason"]
    stop.set()
    await relaying
    await engine.dispose()


def test_a_check_that_distrusts_its_database_says_why(tls: Tls):
    environment = os.environ | {
        "PYTHONPATH": str(SERVICES),
        "TASKMESH_DATABASE_URL": tls.url(authority=tls.other),
    }
    command = [sys.executable, "-m", "ledgers_worker", "check"]

    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert answer.returncode == 1
    assert REFUSED in answer.stdout + answer.stderr


def test_every_session_of_a_running_mesh_is_encrypted(server: Tls, rabbitmq, tmp_path: Path):
    """Whatever opens a connection of its own (to listen, to lead, to look for a cancel) does it by the same URL."""
    roles = ("api", "projector", "scheduler", "reconciler", "relay")
    with running_mesh(server.url(), rabbitmq, tmp_path, *roles) as mesh:
        mesh.wait_until_announced("orders.order.place")
        task_id = mesh.submit("orders.order.place", {"name": "by TLS"})
        assert mesh.gateway.outcome(task_id)["state"] == "succeeded"

        sessions = server.sessions("and datname like any (array['gateway_%', 'orders_%']) group by application_name")

    assert {"gateway-doorbell", "gateway-scheduler-listen", "gateway-reconciler-leader"} <= sessions.keys()
    assert {"gateway-relay-listener", "orders-relay-listener"} <= sessions.keys()
    assert all(sessions.values()), sessions
