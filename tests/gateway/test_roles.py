"""The gateway as it is deployed: processes with narrow rights, started by their roles and stopped by SIGTERM."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pika
import psycopg
import pytest
from sqlalchemy import create_engine

from gateway.models import metadata
from taskmesh.database import driver_url
from taskmesh.management import Management
from taskmesh.parts.postgres import ServiceDatabase
from taskmesh.parts.rabbitmq import create_observer
from taskmesh.topology import declare, worker_topology

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def database(service_database) -> ServiceDatabase:
    return service_database("gateway")


@pytest.fixture
def setup(database: ServiceDatabase, broker) -> dict[str, str]:
    """The elevated environment, of the setup role alone."""
    return {
        "TASKMESH_DATABASE_URL": database.owner_url,
        "TASKMESH_AMQP_URL": broker.amqp_url,
        "TASKMESH_MANAGEMENT_URL": broker.management_url,
    }


@pytest.fixture
def environment(database: ServiceDatabase, broker, setup: dict[str, str], tmp_path: Path) -> dict[str, str]:
    narrow = {
        "TASKMESH_DATABASE_URL": database.url,
        "TASKMESH_AMQP_URL": broker.amqp_url,
        "TASKMESH_HEALTH_DIR": str(tmp_path / "health"),
        "TASKMESH_HTTP_HOST": "127.0.0.1",
        "TASKMESH_HTTP_PORT": "0",
        "TASKMESH_MANAGEMENT_URL": create_observer(broker, broker.vhost),
    }
    subprocess.run([sys.executable, "-m", "gateway", "setup"], env=os.environ | setup, check=True, timeout=60)
    return narrow


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start a role and return when it is ready; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(role: str, **extra: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{role}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", role],
                env=os.environ | environment | extra,
                stdout=log,
                stderr=log,
                text=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def is_ready(tmp_path: Path, role: str) -> bool:
    return (tmp_path / "health" / f"gateway-{role}.ready").exists()


def run_gateway(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def port_of(log: Path) -> int:
    found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
    assert found, log.read_text()
    return int(found[1])


async def test_a_task_goes_from_http_to_its_workers_queue_and_every_role_stops_when_asked(
    environment, start: Start, broker, otlp_sink, tmp_path: Path, eventually
):
    """One process for each role, the database role with rows' rights only, and a caller with a key from `keys create`."""
    await asyncio.to_thread(_declare_worker, broker)
    collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.endpoint}
    roles = {role: start(role, **collector) for role in ("api", "projector", "scheduler", "relay", "reconciler")}
    key = run_gateway(
        environment, "keys", "create", "--name", "test", "--scopes", "tasks:write, tasks:read, types:read"
    ).stdout.strip()
    await eventually(lambda: all(is_ready(tmp_path, role) for role in roles))
    _announce(broker)
    url = f"http://127.0.0.1:{port_of(tmp_path / 'api.log')}"
    request = {"type": "greeter.person.greet", "payload": {}}

    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as http:
        await eventually(lambda: _is_known(http, request["type"]))
        accepted = await http.post("/v1/tasks", json=request)
        message = await asyncio.to_thread(_next_message, broker)
        streaming = asyncio.create_task(http.get(f"/v1/tasks/{accepted.json()['id']}/events"))
        waiting = asyncio.create_task(http.get(f"/v1/tasks/{accepted.json()['id']}", headers={"Prefer": "wait=60"}))
        await asyncio.sleep(0.3)  # Both are under way; nothing tells from outside.

        for process in roles.values():
            process.send_signal(signal.SIGTERM)

        assert message["id"] == accepted.json()["id"]
        assert "event: state" in (await streaming).text
        assert (await waiting).json()["state"] == "queued"
    codes = {role: await asyncio.to_thread(process.wait, 20) for role, process in roles.items()}
    assert codes == dict.fromkeys(roles, 0)
    assert list((tmp_path / "health").iterdir()) == []
    for role in roles:
        log = (tmp_path / f"{role}.log").read_text()
        assert '"level": "ERROR"' not in log, log
        assert "Traceback" not in log, log
    trace_id = accepted.json()["trace_id"]
    [server] = otlp_sink.wait_for(1, name="POST /v1/tasks", where=lambda span: span.trace_id == trace_id)
    assert (server.service, server.kind, server.parent_id) == ("gateway", "server", "")
    assert message["traceparent"].split("-")[1:3] == [trace_id, server.span_id]
    assert not [span.name for span in otlp_sink.spans if span.name.endswith((" send", " receive"))]


async def _is_known(http: httpx.AsyncClient, type_name: str) -> bool:
    return (await http.get(f"/v1/types/{type_name}")).status_code == 200


def _declare_worker(broker: Any) -> None:
    with Management(broker.management_url) as management:
        declare(worker_topology("greeter", []), amqp_url=broker.amqp_url, management=management)


def _announce(broker: Any) -> None:
    body = b"""{"service": "greeter", "release": "1", "announced_at": "2026-01-01T00:00:00Z", "types": [
        {"type": "greeter.person.greet", "kind": "command", "queue": "greeter", "payload_schema": {}}]}"""
    with pika.BlockingConnection(pika.URLParameters(broker.amqp_url)) as connection:
        connection.channel().basic_publish("taskmesh.lifecycle", "manifest.greeter", body)


def _next_message(broker: Any) -> dict[str, Any]:
    with pika.BlockingConnection(pika.URLParameters(broker.amqp_url)) as connection:
        channel = connection.channel()
        for method, properties, _ in channel.consume("greeter", inactivity_timeout=20):
            assert method is not None, "no message came"
            channel.basic_ack(method.delivery_tag)
            channel.cancel()
            return dict(properties.headers)
    raise AssertionError


def test_keys_are_made_listed_and_revoked(gateway_url):
    environment = {"TASKMESH_DATABASE_URL": gateway_url}
    key = run_gateway(environment, "keys", "create", "--name", "shop", "--scopes", "tasks:read").stdout.strip()
    listed = run_gateway(environment, "keys", "list").stdout
    key_id = listed.split("\t")[0]
    revoked = run_gateway(environment, "keys", "revoke", key_id)
    again = run_gateway(environment, "keys", "revoke", key_id)

    assert key.startswith("tm_")
    assert "shop\ttasks:read" in listed
    assert key.split("_", 2)[2] not in listed
    assert revoked.returncode == 0
    assert again.returncode == 1
    assert "revoked already" in again.stderr
    assert "revoked" in run_gateway(environment, "keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("keys", "create", "--name", "x", "--scopes", "tasks:fly"), "must be of tasks:write"),
        (("fly",), "invalid choice"),
    ],
)
def test_a_command_that_makes_no_sense_says_so_in_a_line(arguments, says):
    result = run_gateway({"TASKMESH_DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}, *arguments)

    assert result.returncode != 0
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_role_without_its_settings_names_them_and_stops():
    bare = {name: value for name, value in os.environ.items() if not name.startswith("TASKMESH_")}

    result = subprocess.run(
        [sys.executable, "-m", "gateway", "api"], env=bare, capture_output=True, text=True, timeout=60, check=False
    )

    assert result.returncode == 2
    for name in ("TASKMESH_DATABASE_URL", "TASKMESH_AMQP_URL", "TASKMESH_HTTP_HOST", "TASKMESH_HTTP_PORT"):
        assert name in result.stderr


def test_the_migrations_make_what_the_models_say(gateway_url, database_url):
    """Stricter than `alembic check`: types, defaults, checks, keys and partial indexes are those of the models."""
    engine = create_engine(driver_url(database_url))
    metadata.create_all(engine)
    engine.dispose()

    assert _shape(gateway_url) == _shape(database_url)


def _shape(url: str) -> list[tuple[Any, ...]]:
    """What PostgreSQL says of our tables, in its own words."""
    described = """
        select attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attidentity,
               pg_get_expr(adbin, adrelid)
        from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
        where attrelid = any(%(tables)s::regclass[]) and attnum > 0
        union all
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid), null, null, null
        from pg_constraint where conrelid = any(%(tables)s::regclass[])
        union all
        select indrelid::regclass::text, indexrelid::regclass::text, pg_get_indexdef(indexrelid), null, null, null
        from pg_index where indrelid = any(%(tables)s::regclass[])
        order by 1, 2, 3"""
    with psycopg.connect(url) as connection:
        return connection.execute(described, {"tables": list(metadata.tables)}).fetchall()


def test_setup_may_be_repeated_and_the_runtime_role_cannot_change_what_it_made(environment, setup):
    subprocess.run([sys.executable, "-m", "gateway", "setup"], env=os.environ | setup, check=True, timeout=60)

    with psycopg.connect(environment["TASKMESH_DATABASE_URL"]) as connection:
        connection.execute("select count(*) from tasks")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("drop table tasks")
