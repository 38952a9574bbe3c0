"""The private servers and what they are built from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pika
import psycopg
import pytest
from pika.exceptions import ChannelClosedByBroker

from taskmesh.exchanges import EVENTS
from taskmesh.management import Management
from taskmesh.parts import PartDidNotStart, PartMissing, accounts, postgres, rabbitmq, records
from taskmesh.parts.accounts import data_folder, unprivileged
from taskmesh.parts.ports import RANGE, free_port, is_free
from taskmesh.parts.postgres import GivenPostgres, Postgres, create_service_database
from taskmesh.parts.processes import Process, spawn
from taskmesh.parts.rabbitmq import RabbitMQ, create_service_users, programs, root
from taskmesh.parts.spans import read_spans

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def server(tmp_path):
    """A PostgreSQL that belongs to one test, which may kill it."""
    server = Postgres(tmp_path / "postgres", durable=False)
    server.start()
    yield server
    server.purge()


def test_a_killed_postgres_comes_back_with_what_was_committed(server):
    """The port and the password stay the same, so the URL does."""
    url = server.url
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept (id int)")

    server.kill()
    assert not server.is_running()
    server.start()

    assert server.url == url
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_starting_a_running_postgres_again_changes_nothing(server):
    """Whoever needs it may call start, from any process."""
    before = server.process

    Postgres(server.log.parent, durable=False).start()

    assert server.process == before


def test_a_postgres_whose_port_was_taken_takes_another(server):
    """The port is kept while it can be; a stranger on it must not keep the server down."""
    port = server.url.rpartition(":")[2].partition("/")[0]
    server.stop()

    with socket.create_server(("127.0.0.1", int(port))):
        server.start()

    assert f":{port}/" not in server.url
    psycopg.connect(server.url).close()


def test_postgres_is_on_loopback_with_a_password_and_unprivileged(server):
    """Nobody else on the machine or the network gets in."""
    with psycopg.connect(server.url) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("127.0.0.1",)
        assert connection.execute("SHOW unix_socket_directories").fetchone() == ("",)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url.replace(":", ":x", 2).replace("x//", "//", 1))
    owner = Path(f"/proc/{server.process.pid}").stat().st_uid
    assert owner != 0
    assert (server.log.parent / "postgres.json").stat().st_mode & 0o077 == 0


def test_a_machine_without_postgres_says_what_to_do_in_one_line(tmp_path, monkeypatch):
    """No traceback, no list of everything that was tried."""
    monkeypatch.setattr(postgres, "_program_folders", list)

    server = Postgres(tmp_path / "postgres")
    with pytest.raises(PartMissing) as missing:
        server.start()
    server.purge()

    assert "apt-get install postgresql" in str(missing.value)
    assert "\n" not in str(missing.value)


def test_a_given_server_that_is_down_is_named_by_its_variable():
    """The reader knows the variable, not our classes."""
    with pytest.raises(PartDidNotStart, match="TASKMESH_DATABASE_URL"):
        GivenPostgres(f"postgresql://a:b@127.0.0.1:{free_port()}/x").start()


def test_an_account_without_the_right_to_create_databases_is_named(postgres):
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'")
    try:
        with pytest.raises(PartMissing, match="account clerk must be allowed to create roles and databases"):
            create_service_database(f"postgresql://clerk:clerk@{postgres.rpartition('@')[2]}", "ledgers")
    finally:
        with psycopg.connect(postgres, autocommit=True) as admin:
            admin.execute("DROP ROLE clerk")


@pytest.fixture(params=[None, root.SERIES])
def node(request, tmp_path, monkeypatch):
    """A RabbitMQ that belongs to one test: of the machine's release, and of 4 where it can be had."""
    if request.param:
        monkeypatch.setenv(programs.RELEASE_VARIABLE, request.param)
    elif programs.installed_server() is None:
        pytest.skip("no RabbitMQ is installed")
    else:
        monkeypatch.delenv(programs.RELEASE_VARIABLE, raising=False)
    node = RabbitMQ(tmp_path / "rabbitmq")
    try:
        node.start()
    except PartMissing as missing:
        pytest.skip(str(missing))
    yield node
    node.purge()


def test_a_killed_rabbitmq_comes_back_with_its_messages_and_leaves_no_epmd(node, tmp_path):
    """The node name is part of its data, and must not change with anything."""
    record = json.loads((tmp_path / "rabbitmq" / "rabbitmq.json").read_text())
    with Management(node.management_url) as management:
        assert management.overview()["rabbitmq_version"].partition(".")[0] == record["series"]
    with pika.BlockingConnection(pika.URLParameters(node.amqp_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        # Not a quorum queue: 3.10 writes those down up to half a second after it has confirmed their declaration.
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"hello", pika.BasicProperties(delivery_mode=2), mandatory=True)

    node.kill()
    assert not node.is_running()
    node.start()

    with pika.BlockingConnection(pika.URLParameters(node.amqp_url)) as connection:
        assert connection.channel().basic_get("kept", auto_ack=True)[2] == b"hello"
    assert "kept" in node.control("list_queues")
    node.stop()
    record = json.loads((tmp_path / "rabbitmq" / "rabbitmq.json").read_text())
    assert not Process.from_json(record["epmd"]).is_running()
    assert all(is_free(port) for port in record["ports"].values())
    node.purge()
    assert not (tmp_path / "rabbitmq").exists()


def test_the_data_of_one_release_is_not_handed_to_another(tmp_path, monkeypatch):
    """A RabbitMQ 4 cannot open what 3.10 has written; the reader learns how to go on."""
    records.write(tmp_path / "rabbitmq.json", {"series": "3"})
    monkeypatch.setenv(programs.RELEASE_VARIABLE, "4")

    with pytest.raises(PartDidNotStart, match="holds the data of a RabbitMQ 3, which a RabbitMQ 4 cannot take over"):
        RabbitMQ(tmp_path).start()


def test_a_root_that_was_left_half_made_is_made_anew_and_only_once(tmp_path, monkeypatch):
    """Its maker was killed; then two ask for it at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(root, "KEYS", tmp_path)
    made = []

    def fill(draft):
        assert not draft.exists()
        draft.mkdir()
        (draft / "whole").touch()
        made.append(draft)

    monkeypatch.setattr(root, "_fill", fill)
    (root.folder().with_name("rabbitmq-4.draft") / "half").mkdir(parents=True)

    with ThreadPoolExecutor() as pool:
        [first, second] = pool.map(lambda _: root.make(), range(2))

    assert first == second == root.folder()
    assert [path.name for path in root.folder().iterdir()] == ["whole"]
    assert len(made) == 1
    assert not made[0].exists()


def test_a_machine_that_gives_no_right_to_mount_says_what_rabbitmq_4_takes(tmp_path, monkeypatch):
    """Root in a narrow container, or a user without user namespaces."""
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    unshare.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(root, "make", root.folder)

    with pytest.raises(PartMissing, match=r"right to mount.*user namespaces.*Operation not permitted"):
        programs.Unpacked().prepare()


def test_a_release_that_nobody_has_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(programs.RELEASE_VARIABLE, "99")

    with pytest.raises(PartMissing, match=r"RabbitMQ 99 was not found.*TASKMESH_AMQP_URL"):
        rabbitmq.find(tmp_path, say=print)


def test_a_machine_without_rabbitmq_says_what_to_do_in_one_line(tmp_path, monkeypatch):
    """Each way out is in the line: the package, Docker, a given server."""
    monkeypatch.setattr(programs, "installed_server", lambda: None)
    monkeypatch.delenv("TASKMESH_RABBITMQ", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")

    with pytest.raises(PartMissing) as missing:
        rabbitmq.find(tmp_path, say=print, install=False)

    assert all(way in str(missing.value) for way in ("apt-get", "Docker", "TASKMESH_AMQP_URL"))
    assert "\n" not in str(missing.value)


def test_a_services_run_time_user_may_declare_nothing(rabbitmq, broker):
    """What a role needs was declared by its setup, which has a user of its own."""
    users = create_service_users(rabbitmq, broker.vhost, "billing")
    with pika.BlockingConnection(pika.URLParameters(users.setup_amqp_url)) as connection:
        connection.channel().exchange_declare(EVENTS, "topic", durable=True)

    with (
        pika.BlockingConnection(pika.URLParameters(users.amqp_url)) as connection,
        pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"),
    ):
        connection.channel().queue_declare("billing", durable=True)


def test_a_process_is_not_mistaken_for_another_with_its_pid():
    """A record that is older than the process is about another one, and signals it in no way."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        stranger = Process(child.pid, "another boot/1")

        assert Process.of(child.pid).is_running()
        assert not stranger.is_running()
        stranger.kill()
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def test_killing_a_process_takes_what_it_started_along(tmp_path):
    """A worker that was killed from outside has left its pool behind; the next kill finds it by its session."""
    script = "import os, signal; os.fork() or os.fork(); os.write(1, b'%d\\n' % os.getpid()); signal.pause()"
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    process = spawn([sys.executable, "-c", script], log=tmp_path / "log")
    try:
        os.set_blocking(reader, True)
        with os.fdopen(reader) as log:
            members = [Process.of(int(log.readline())) for _ in range(3)]

        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        assert sum(member.is_running() for member in members) == 2
    finally:
        process.kill()

    assert all(member.wait(5) for member in members)


def test_free_ports_are_out_of_the_way_of_outgoing_connections():
    """A part that is down must find its port free when it comes back."""
    assert free_port() in RANGE
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(preferred=[port]) != port


@as_root
def test_data_goes_where_the_unprivileged_account_can_reach_it(tmp_path, monkeypatch):
    """Below a closed folder the data moves, and the folder stays closed."""
    monkeypatch.setattr(accounts, "FALLBACK", tmp_path / "fallback")
    tmp_path.chmod(0o700)

    home = data_folder(tmp_path / "closed" / "postgres", unprivileged())

    assert home.parent == tmp_path / "fallback"
    assert home == data_folder(tmp_path / "closed" / "postgres", unprivileged())
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_otlp_json_writes_ids_in_hex():
    """Protobuf's own JSON mapping would read them as base64."""
    request = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "gateway"}}]},
                "scopeSpans": [
                    {
                        "spans": [
                            {
                                "traceId": "5b8efff798038103d269b633813fc60c",
                                "spanId": "eee19b7ec3c1b174",
                                "name": "POST /v1/tasks",
                                "kind": 2,
                                "startTimeUnixNano": "1544712660000000000",
                                "endTimeUnixNano": "1544712661500000000",
                                "status": {"code": 2, "message": "boom"},
                            }
                        ]
                    }
                ],
            }
        ]
    }

    [span] = read_spans(json.dumps(request).encode(), content_type="application/json")

    assert (span.trace_id, span.span_id) == ("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert (span.service, span.kind, span.failed, span.duration_seconds) == ("gateway", "server", True, 1.5)


def test_a_link_names_the_span_at_its_other_end_and_says_what_it_is_for():
    """Attributes may hold anything, bytes too; what comes out can be written as JSON."""
    link = {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": "eee19b7ec3c1b174",
        "attributes": [
            {"key": "taskmesh.link", "value": {"stringValue": "replay_of"}},
            {"key": "raw", "value": {"bytesValue": "AQI="}},
        ],
    }
    span = {"traceId": "00" * 16, "spanId": "00" * 8, "name": "publish taskmesh.commands", "links": [link]}
    request = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}

    [read] = read_spans(json.dumps(request).encode(), content_type="application/json")

    [link] = read.links
    assert (link.trace_id, link.span_id) == ("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert json.loads(json.dumps(link.attributes)) == {"taskmesh.link": "replay_of", "raw": "AQI="}


def test_what_is_no_otlp_is_refused():
    """One error for all the ways in which a body can be wrong."""
    for headers in ({}, {"content_type": "application/json"}, {"content_encoding": "gzip"}):
        with pytest.raises(ValueError, match="not an OTLP trace export"):
            read_spans(b"\xff not spans", **headers)
