"""Where a service is verified: servers of our own, with nothing in them but the service, and one clean world per run.

Nothing of a production mesh is reached: the service is told the addresses of the sandbox, and of the caller's
environment it sees only what a program needs to run, and what the caller names.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import pika
import psycopg
from pika.adapters.blocking_connection import BlockingChannel
from psycopg import sql

from taskmesh import amqp
from taskmesh.contracts.manifest import Manifest
from taskmesh.errors import TaskmeshError
from taskmesh.management import Management
from taskmesh.parts.postgres import ServiceDatabase, create_service_database, drop_database, drop_service_database
from taskmesh.parts.rabbitmq import Broker, ServiceUsers, create_service_users, create_vhost, delete_vhost, in_vhost
from taskmesh.testing import servers
from taskmesh.testing.servers import Servers
from taskmesh.testing.smtp import SmtpSink
from taskmesh.topology import LIFECYCLE_QUEUE, declare, gateway_topology
from taskmesh.verify.journal import Journal
from taskmesh.verify.nursery import LOG_LINES, Nursery, WorkerEnded
from taskmesh.verify.plan import Plan

SETUP_SECONDS = 120.0
READY_SECONDS = 60.0
LEAVE_SECONDS = 20.0
POLL_SECONDS = 0.05

KEPT = ("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT")
KEPT_PREFIXES = ("LC_", "PYTHON", "SSL_CERT_")
"""What the service sees of the caller's environment: no address, and no credential."""

MAIL = {
    "TASKMESH_MAIL_DOMAIN": "verify.example",
    "TASKMESH_MAIL_FROM": "Verify <verify@verify.example>",
    # The sink answers at once or not at all: a mail whose fate is unknown need not rest for minutes.
    "TASKMESH_SMTP_ANSWER_SECONDS": "2",
    "TASKMESH_RESEND_AFTER_SECONDS": "1",
}


class SandboxFailed(TaskmeshError):
    """The service did not come up in the sandbox; the message holds the end of its log."""

    code = "sandbox_failed"


@dataclass(frozen=True, slots=True)
class World:
    """A state that runs begin with: a database to copy, and the objects that belong to it."""

    database: str
    objects: Path


class Scene:
    """One run of the service's worker in a world of its own."""

    def __init__(self, sandbox: Sandbox, world: World, folder: Path) -> None:
        self.world = world
        self.journal = Journal(folder / "journal")
        self.database_url = sandbox.in_database(world.database)
        self.environment = sandbox.environment(world, folder)
        self.first_mail = len(sandbox.sink.messages)
        self.is_kept = False
        """True if the world is to stay as it is at the end, for other runs to begin with."""
        self._ready = folder / f"{sandbox.plan.service}-worker.ready"
        try:
            self._worker = sandbox.nursery.start(
                sandbox.plan.package,
                journal=self.journal.path,
                log=folder / "worker.log",
                environment=self.environment,
            )
        except WorkerEnded as ended:
            raise SandboxFailed(f"no worker could be started:\n{ended}") from ended

    def wait_until_ready(self) -> None:
        """Return when the worker consumes.

        Raises:
            SandboxFailed: It ended, or was not ready in time.
        """
        end = time.monotonic() + READY_SECONDS
        while not self._ready.exists():
            self.check()
            if time.monotonic() > end:
                raise SandboxFailed(f"the worker was not ready within {READY_SECONDS:.0f} s:\n{self._worker.log_end()}")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise SandboxFailed if the worker has ended."""
        try:
            self._worker.check()
        except WorkerEnded as ended:
            raise SandboxFailed(f"the worker ended:\n{ended}") from ended

    def end(self) -> None:
        """Kill the worker: everything that it has done is committed and acknowledged, or does not count."""
        self._worker.kill()


class Sandbox:
    """Private servers with one service set up in them; use it as a context manager.

    Args:
        say: Is told what takes its time.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.sink = SmtpSink()
        self.manifest: Manifest
        self.first: World
        self.nursery: Nursery
        self._say = say
        self._exits = contextlib.ExitStack()
        self._name = f"{plan.service}_{secrets.token_hex(4)}"
        self._vhost = f"verify-{secrets.token_hex(4)}"
        self._runs = 0
        self._folder: Path
        self._postgres_url: str
        self._broker: Broker
        self._database: ServiceDatabase
        self._users: ServiceUsers

    def __enter__(self) -> Self:
        with self._exits:
            self._start_servers()
            self._set_up()
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._say("cleaning up")
        with uninterrupted():
            self._exits.close()

    def _start_servers(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="taskmesh-verify-"))
        self._exits.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._say("starting PostgreSQL and RabbitMQ")
        servers.release_abandoned()
        run = servers.RUNS / f"run-verify-{os.getpid()}"
        servers.claim(run)
        self._exits.callback(servers.release, run)
        # What the parts say while they start belongs to a person, not into the report.
        with contextlib.redirect_stdout(sys.stderr):
            self._postgres_url = Servers(run).postgres().url
            self._broker = Servers(run).rabbitmq()
        self._exits.enter_context(self.sink)

    def _set_up(self) -> None:
        """Give the service its database and its broker users, as a mesh does, and run its setup role."""
        service, management_url = self.plan.service, self._broker.management_url
        self._exits.callback(drop_service_database, self._postgres_url, self._name)
        self._database = create_service_database(self._postgres_url, self._name)
        self._exits.callback(self._forget_broker, management_url)
        create_vhost(management_url, self._vhost)
        self._users = create_service_users(self._broker, self._vhost, service)
        with Management(management_url) as management:
            declare(gateway_topology(), amqp_url=self._admin_amqp_url, management=management)
        self.first = World(self._name, self._folder / "objects")
        self.first.objects.mkdir()
        self._say(f"setting up {service}")
        elevated = {
            "TASKMESH_DATABASE_URL": self._database.owner_url,
            "TASKMESH_AMQP_URL": self._users.setup_amqp_url,
            "TASKMESH_MANAGEMENT_URL": self._users.setup_management_url,
        }
        environment = self.environment(self.first, self._folder)
        self._run([sys.executable, "-m", self.plan.package, "setup"], environment | elevated)
        for command in self.plan.prepare:
            self._say(f"preparing: {command}")
            self._run(["/bin/sh", "-c", command], environment)
        self.manifest = self._announced()
        self.nursery = self._exits.enter_context(Nursery(self._folder, environment))

    def _forget_broker(self, management_url: str) -> None:
        delete_vhost(management_url, self._vhost)
        with Management(management_url) as management:
            for name in (self.plan.service, f"{self.plan.service}-setup"):
                with contextlib.suppress(TaskmeshError):
                    management.delete_user(f"{self._vhost}-{name}")

    def _run(self, command: list[str], environment: Mapping[str, str]) -> None:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SETUP_SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
        if ended.returncode:
            said = "\n".join(ended.stdout.splitlines()[-LOG_LINES:])
            raise SandboxFailed(f"`{shlex.join(command)}` ended with {ended.returncode}:\n{said}")

    def _announced(self) -> Manifest:
        """The manifest, as the gateway would receive it."""
        with self.channel() as channel:
            while True:
                method, _, body = channel.basic_get(LIFECYCLE_QUEUE, auto_ack=True)
                if method is None:
                    raise SandboxFailed(f"`python -m {self.plan.package} setup` announced no manifest")
                if method.routing_key.startswith("manifest."):
                    return Manifest.model_validate_json(body)

    def environment(self, world: World, folder: Path) -> dict[str, str]:
        """What a process of the service is told."""
        kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
        parts = {"TASKMESH_SMTP_URL": self.sink.url, "TASKMESH_OBJECT_STORE_URL": world.objects.as_uri()}
        ours = {
            "TASKMESH_DATABASE_URL": _named(self._database.url, world.database),
            "TASKMESH_AMQP_URL": self._users.amqp_url,
            "TASKMESH_HEALTH_DIR": str(folder),
            "TASKMESH_LOG_FORMAT": "console",
            # Two copies at once need two processes, and a process that dies must not be the worker's only one.
            "TASKMESH_WORKER_POOL": "prefork",
            "TASKMESH_WORKER_CONCURRENCY": "2",
            "PYTHONUNBUFFERED": "1",
        }
        return {**kept, **MAIL, **parts, **self.plan.environment, **ours}

    @contextlib.contextmanager
    def scene(self, world: World) -> Iterator[Scene]:
        """A copy of the world with a worker in it, which ends with the block; so does the copy, unless it is kept."""
        self._runs += 1
        folder = self._folder / f"run-{self._runs}"
        folder.mkdir()
        copy = World(f"{self._name}_{self._runs}", folder / "objects")
        with contextlib.ExitStack() as exits:
            drop = self._exits.enter_context(contextlib.ExitStack())
            drop.callback(shutil.rmtree, folder, ignore_errors=True)
            drop.callback(drop_database, self._postgres_url, copy.database)
            self._copy(world, copy)
            scene = Scene(self, copy, folder)
            exits.callback(self._forget_messages)
            exits.callback(scene.end)
            scene.wait_until_ready()
            yield scene
        if not scene.is_kept:
            drop.close()

    def _copy(self, world: World, copy: World) -> None:
        shutil.copytree(world.objects, copy.objects)
        with psycopg.connect(self._postgres_url, autocommit=True) as admin:
            # A killed worker's sessions may not have noticed yet, and a template must have none.
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [world.database])
            names = [sql.Identifier(name) for name in (copy.database, world.database, f"{self._name}_owner")]
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}").format(*names))
        with psycopg.connect(self.in_database(copy.database), autocommit=True) as database:
            database.execute("DELETE FROM outbox")

    def _forget_messages(self) -> None:
        """Empty the queues once the killed worker's deliveries are back in them."""
        service = self.plan.service
        end = time.monotonic() + LEAVE_SECONDS
        with self.channel() as channel:
            for queue in (service, f"{service}.events", f"{service}.control", LIFECYCLE_QUEUE):
                while channel.queue_declare(queue, passive=True).method.consumer_count:
                    if time.monotonic() > end:
                        raise SandboxFailed(f"queue {queue} still has the consumer of a worker that was killed")
                    time.sleep(POLL_SECONDS)
                channel.queue_purge(queue)

    def in_database(self, name: str) -> str:
        """The administrator's URL of a database of the sandbox."""
        return _named(self._postgres_url, name)

    @property
    def _admin_amqp_url(self) -> str:
        return in_vhost(self._broker.amqp_url, self._vhost)

    @contextlib.contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        """A channel of the administrator's; for moments only, as nobody answers the broker's heartbeats."""
        parameters = amqp.parameters(self._admin_amqp_url, name="taskmesh-verify")
        with amqp.translating(), pika.BlockingConnection(parameters) as connection:
            yield connection.channel()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hear no Ctrl-C and no SIGTERM in the block: half a clean-up leaves servers behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not a signal mask: another thread would take the signal, and Python raises in this one.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))
