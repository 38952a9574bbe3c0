"""The servers of one test run: started by the first test that needs them, shared by all of pytest-xdist's workers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from taskmesh.parts import PartMissing, records
from taskmesh.parts.postgres import GivenPostgres, Postgres
from taskmesh.parts.processes import Process
from taskmesh.parts.rabbitmq import Broker, DockerRabbitMQ, GivenRabbitMQ, RabbitMQ, find
from taskmesh.testing.containers import DockerPostgres

MEMORY = Path("/dev/shm")  # noqa: S108 - only folders of our own are used in it
ENOUGH_BYTES = 4 << 30
"""Far more than a run needs; where there is less, memory may be short for other things, too."""


def _folder() -> Path:
    """Where runs keep their data: in memory where there is plenty of it, unless `TMPDIR` says otherwise.

    Each database is 300 files that are made and deleted for one test. ext4 without a journal then spends ten times as
    long as the server on finding free inodes: a fifth of a second of CPU for each test.
    """
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
        found = os.statvfs(MEMORY)
        # The programs of PostgreSQL may have to be copied there and run.
        if found.f_bavail * found.f_frsize >= ENOUGH_BYTES and not found.f_flag & os.ST_NOEXEC:
            return MEMORY
    return Path(tempfile.gettempdir())


_NAME = f"taskmesh-tests-{os.getuid()}"
RUNS = _folder() / _NAME
RUNS_ON_DISK = Path(tempfile.gettempdir()) / _NAME


class Servers:
    """The servers in a run's folder.

    `TASKMESH_TEST_DATABASE_URL`, and `TASKMESH_TEST_AMQP_URL` with `TASKMESH_TEST_MANAGEMENT_URL`, name servers to use
    instead; `TASKMESH_TEST_BACKEND=containers` takes them from Docker.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._containers = os.environ.get("TASKMESH_TEST_BACKEND") == "containers"

    def postgres(self) -> Postgres | DockerPostgres | GivenPostgres:
        """A PostgreSQL that answers."""
        if url := os.environ.get("TASKMESH_TEST_DATABASE_URL"):
            return GivenPostgres(url)
        with self._locked():
            server = self._own_postgres()
            server.start()
        return server

    def rabbitmq(self) -> Broker:
        """A RabbitMQ that answers."""
        if url := os.environ.get("TASKMESH_TEST_AMQP_URL"):
            management_url = os.environ.get("TASKMESH_TEST_MANAGEMENT_URL")
            if not management_url:
                raise PartMissing("TASKMESH_TEST_AMQP_URL is set: set TASKMESH_TEST_MANAGEMENT_URL, too.")
            return GivenRabbitMQ(url, management_url)
        with self._locked():
            server = self._own_rabbitmq()
            server.start()
        return server

    def purge(self) -> None:
        """Stop what was started here and delete its data."""
        if not self._folder.exists():
            return
        self._own_postgres().purge()
        for rabbitmq in (RabbitMQ(self._folder / "rabbitmq"), DockerRabbitMQ(self._folder / "rabbitmq")):
            if (self._folder / "rabbitmq").exists():
                rabbitmq.purge()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _own_postgres(self) -> Postgres | DockerPostgres:
        folder = self._folder / "postgres"
        return DockerPostgres(folder) if self._containers else Postgres(folder, durable=False)

    def _own_rabbitmq(self) -> RabbitMQ | DockerRabbitMQ:
        folder = self._folder / "rabbitmq"
        return DockerRabbitMQ(folder) if self._containers else find(folder, say=print)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        RUNS.mkdir(mode=0o755, exist_ok=True)
        self._folder.mkdir(mode=0o755, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def new_run(*, on_disk: bool = False) -> Path:
    """The folder of a new test run, named for the process that will clean up; it is made when it is needed.

    Args:
        on_disk: Never in memory: what is written there costs what it costs a deployment.
    """
    return (RUNS_ON_DISK if on_disk else RUNS) / f"run-{os.getpid()}"


def claim(folder: Path) -> None:
    """Record that this process cleans up the run's folder."""
    folder.parent.mkdir(mode=0o755, exist_ok=True)
    records.write(folder.with_suffix(".json"), Process.of(os.getpid()).to_json())


def release(folder: Path) -> None:
    """Stop the run's servers and forget the run."""
    Servers(folder).purge()
    folder.with_suffix(".json").unlink(missing_ok=True)


def release_abandoned() -> None:
    """Stop the servers of runs that were killed before they could."""
    for record in (record for runs in {RUNS, RUNS_ON_DISK} for record in runs.glob("run-*.json")):
        owner = Process.from_json(records.read(record))
        if owner is None or not owner.is_running():
            release(record.with_suffix(""))
