"""The role `check`: a look at the schema that changes nothing and needs no right but to read."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from taskmesh.database import LIBRARY_VERSION_TABLE, SERVICE_VERSION_TABLE, is_migrated, migrate
from taskmesh.parts.postgres import ServiceDatabase
from taskmesh.testing.proxy import TcpProxy
from taskmesh.testing.waiting import eventually

SCRIPTS = Path(__file__).parents[1] / "services" / "ledgers_worker" / "migrations"


@pytest.fixture
def database(service_database) -> ServiceDatabase:
    return service_database("ledgers")


def run_check(database: ServiceDatabase, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TASKMESH_DATABASE_URL": database.url} | variables
    command = [sys.executable, "-m", "ledgers_worker", "check"]
    environment["PYTHONPATH"] = str(SCRIPTS.parents[1])
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def set_revision(database: ServiceDatabase, table: str, revision: str) -> None:
    with psycopg.connect(database.owner_url) as connection:
        connection.execute(f"update {table} set version_num = %s", [revision])


def test_an_empty_database_is_refused_and_left_empty(database):
    assert not is_migrated(database.url, scripts=SCRIPTS)

    with psycopg.connect(database.owner_url) as connection:
        assert connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone() == (0,)


def test_a_migrated_database_is_taken_by_the_narrow_role(database):
    migrate(database.owner_url, scripts=SCRIPTS)

    assert is_migrated(database.url, scripts=SCRIPTS)
    assert is_migrated(database.url, scripts=None)


def test_a_schema_of_the_release_before_is_refused(database):
    migrate(database.owner_url, scripts=SCRIPTS)
    set_revision(database, LIBRARY_VERSION_TABLE, "0001")

    assert not is_migrated(database.url, scripts=SCRIPTS)


def test_a_schema_of_a_later_release_is_taken_so_that_a_release_can_be_rolled_back(database):
    migrate(database.owner_url, scripts=SCRIPTS)
    set_revision(database, SERVICE_VERSION_TABLE, "0099")

    assert is_migrated(database.url, scripts=SCRIPTS)


def test_setup_of_a_release_that_was_rolled_back_leaves_a_later_schema_as_it_is(database):
    """The later release has migrated; this one's code and `setup` go on beside its schema."""
    migrate(database.owner_url, scripts=SCRIPTS)
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("alter table inbox add column added_later text")
    for table in (LIBRARY_VERSION_TABLE, SERVICE_VERSION_TABLE):
        set_revision(database, table, "0099")

    migrate(database.owner_url, scripts=SCRIPTS)

    assert is_migrated(database.url, scripts=SCRIPTS)
    with psycopg.connect(database.url) as connection:
        assert connection.execute(f"select version_num from {SERVICE_VERSION_TABLE}").fetchone() == ("0099",)
        assert connection.execute("select added_later from inbox").fetchall() == []


def test_the_role_says_no_at_once_and_yes_once_setup_is_done(database):
    before = run_check(database)
    migrate(database.owner_url, scripts=SCRIPTS)
    after = run_check(database, TASKMESH_CHECK_WAIT_SECONDS="30")

    assert before.returncode == 1
    assert "setup has not run for this release" in before.stderr + before.stdout
    assert after.returncode == 0, after.stderr


def test_the_role_waits_for_a_database_that_is_away_and_names_no_address(database):
    answer = run_check(database, TASKMESH_DATABASE_URL="postgresql://nobody:secret@127.0.0.1:1/none")

    assert answer.returncode == 1
    assert "the database cannot be read" in answer.stderr + answer.stdout
    assert "secret" not in answer.stderr + answer.stdout


def test_a_secret_may_be_a_file_and_the_environment_comes_first(database, tmp_path):
    migrate(database.owner_url, scripts=SCRIPTS)
    (tmp_path / "TASKMESH_DATABASE_URL").write_text(database.url + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "TASKMESH_DATABASE_URL"}
    environment |= {"PYTHONPATH": str(SCRIPTS.parents[1]), "TASKMESH_SECRETS_DIR": str(tmp_path)}

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ledgers_worker", "check"]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, check=False, timeout=60
        )

    assert run().returncode == 0
    assert run(TASKMESH_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none").returncode == 1


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as lines:
        return subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)


async def test_setup_waits_for_a_database_that_is_only_being_started(database, broker, tmp_path):
    """Migrations come as soon as it answers; without patience it fails at once."""
    async with TcpProxy(database.owner_url) as proxy:
        await proxy.refuse()
        environment = os.environ | {
            "PYTHONPATH": str(SCRIPTS.parents[1]),
            "TASKMESH_DATABASE_URL": proxy.url,
            "TASKMESH_AMQP_URL": broker.amqp_url,
            "TASKMESH_MANAGEMENT_URL": broker.management_url,
        }
        command = [sys.executable, "-m", "ledgers_worker", "setup"]
        hasty = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, timeout=60)
        log = tmp_path / "setup.log"
        patient = start(command, log, environment | {"TASKMESH_SETUP_WAIT_SECONDS": "90"})
        await asyncio.to_thread(eventually, lambda: "setup waits" in log.read_text())
        await proxy.accept()

        assert await asyncio.to_thread(patient.wait, 90) == 0, log.read_text()
        assert hasty.returncode != 0
    assert is_migrated(database.url, scripts=SCRIPTS)
