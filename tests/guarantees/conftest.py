"""What the paths of loss have in common: a service that can be broken, a ledger that hears of it, and servers to kill."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest
from sqlalchemy.orm import Session

from running_gateway import Gateway, running_gateway
from running_orders import Orders, orders_service
from taskmesh import celery_protocol, outbox
from taskmesh.celery_protocol import TaskMessage
from taskmesh.database import sync_engine
from taskmesh.management import Management
from taskmesh.parts.postgres import Postgres
from taskmesh.parts.rabbitmq import RabbitMQ, find
from taskmesh.testing.waiting import eventually
from wires import Wire

FRAGILE = Path(__file__).parents[1] / "services" / "fragile_orders.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder time for the start of servers of their own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))


class Fragile(Orders):
    """The orders service, whose tasks wait for a test's word and write down their starts."""

    def starts(self, task_id: str) -> int:
        """How often the task's code began to run."""
        trail = self.health / f"{task_id}.starts"
        return len(trail.read_text().splitlines()) if trail.exists() else 0

    def started(self, task_id: str, times: int = 1) -> None:
        """Wait until the task's code has begun so often."""
        eventually(lambda: self.starts(task_id) >= times, explain=self.end_of_log)

    def release(self, task_id: str) -> None:
        """Let a task that is held go on."""
        (self.health / f"{task_id}.go").touch()

    def attempts(self, task_id: str) -> int:
        """How many starts the inbox counts."""
        return int(self.rows("select starts from inbox where task_id = %s", task_id)[0][0])

    def write(self, type_name: str, **payload: Any) -> str:
        """Leave a task in the service's outbox, as a transaction of its own would; returns the task's id."""
        task_id = uuid4()
        self._write(TaskMessage(type=type_name, id=task_id, payload=payload))
        return str(task_id)

    def _write(self, message: TaskMessage) -> None:
        engine = sync_engine(self.database_url)
        with Session(engine) as session:
            outbox.put(session.connection(), [celery_protocol.command(message)])
            session.commit()
        engine.dispose()

    def children(self) -> list[int]:
        """The processes of the worker's pool."""
        pid = self.processes["worker"].pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def catches_sigterm(self) -> bool:
        """True once the worker has a handler of its own for SIGTERM."""
        try:
            status = Path(f"/proc/{self.processes['worker'].pid}/status").read_text()
        except OSError:
            return False
        [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
        return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))

    def outbox(self) -> int:
        """How many rows wait to be published: tasks, not reports."""
        return int(self.rows("select count(*) from outbox where exchange <> 'taskmesh.lifecycle'")[0][0])

    def waits_for_a_lock(self) -> bool:
        """True while a connection of the service waits for what another holds."""
        statement = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        return bool(self.rows(statement))

    def messages(self, queue: str = "orders") -> int:
        """How many messages wait in a queue; those that were handed over and not acknowledged are not among them."""
        with pika.BlockingConnection(pika.URLParameters(self.amqp_url)) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)

    @contextlib.contextmanager
    def policy(self, **changes: Any) -> Iterator[None]:
        """Change, for the length of the block, what the broker does with the queue of commands."""
        with Management(self.management_url) as management:
            [usual] = [policy for policy in management.policies(self.vhost) if policy["name"] == "orders"]

            def put(definition: dict[str, Any]) -> None:
                how = {"pattern": usual["pattern"], "apply_to": usual["apply-to"]}
                management.put_policy(self.vhost, "orders", definition=definition, **how)

            # What the broker does not know, it refuses.
            known = {key.replace("_", "-"): value for key, value in changes.items()}
            put(usual["definition"] | {key: value for key, value in known.items() if key in usual["definition"]})
            try:
                yield
            finally:
                put(usual["definition"])

    def consumers(self, queue: str = "orders") -> int:
        """How many workers take messages from a queue."""
        with pika.BlockingConnection(pika.URLParameters(self.amqp_url)) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).method.consumer_count)

    def unacknowledged(self, queue: str = "orders") -> int:
        """How many messages were handed over and not acknowledged; some seconds old."""
        with Management(self.management_url) as management:
            return int(management.queue(self.vhost, queue).get("messages_unacknowledged", 0))

    def end_of_log(self) -> str:
        """The last lines of the worker's log."""
        return "\n".join((self.health / "worker.log").read_text().splitlines()[-15:])

    def one_effect(self, task_id: str) -> bool:
        """True if what the task does was done, once."""
        return self.notes(task_id) == ["done"]


@pytest.fixture(scope="package")
def shared_orders(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    """One service for all modules, because it takes seconds to start."""
    folder = tmp_path_factory.mktemp("orders")
    with orders_service(postgres, rabbitmq, folder, script=FRAGILE, kind=Fragile) as service:
        yield service


@pytest.fixture(scope="package")
def shared_ledger(postgres: str, shared_orders: Fragile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One ledger for it."""
    folder = tmp_path_factory.mktemp("gateway")
    urls = (shared_orders.amqp_url, shared_orders.management_url)
    with running_gateway(postgres, *urls, folder, "projector") as gateway:
        # What it calls an unknown task depends on what it knows.
        eventually(lambda: gateway.rows("select 1 from manifests where service = 'orders'"))
        yield gateway


@pytest.fixture
def orders(shared_orders: Fragile) -> Fragile:
    """The service, with a relay and a worker that work; a test may leave them stopped."""
    for role in ("relay", "worker"):
        if shared_orders.processes[role].poll() is not None:
            shared_orders.start(role)
    return shared_orders


@pytest.fixture
def ledger(shared_ledger: Gateway) -> Gateway:
    """A gateway's database, and a projector that writes what is reported of the orders service into it."""
    if shared_ledger.processes["projector"].poll() is not None:
        shared_ledger.start("projector")
    return shared_ledger


@pytest.fixture(scope="module")
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A broker that the module may kill."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = find(Path(folder) / "rabbitmq", say=print)
        if not isinstance(server, RabbitMQ):
            pytest.skip("needs an installed rabbitmq-server, to raise its alarms")
        server.start()
        try:
            yield server
        finally:
            server.purge()


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    """A database server that the module may kill; durable, because what was committed must survive that."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder) / "postgres")
        server.start()
        try:
            yield server
        finally:
            server.purge()


@pytest.fixture
def wire() -> Iterator[Callable[[str], Wire]]:
    """Call it with a server's URL for a proxy in front of it."""
    made: list[Wire] = []

    def make(url: str) -> Wire:
        made.append(Wire(url))
        return made[-1]

    yield make
    for one in made:
        one.close()
