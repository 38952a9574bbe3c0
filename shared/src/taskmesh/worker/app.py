"""The Celery app of a worker service: what it sends goes through the outbox, what it runs is a `MeshTask`."""

from __future__ import annotations

import gc
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from celery import Celery
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.entity import Exchange, Queue
from kombu.serialization import dumps
from pydantic import SecretStr, TypeAdapter
from pydantic.errors import PydanticUserError
from sqlalchemy import Connection, Engine, text

from taskmesh import celery_protocol, exchanges, telemetry, traces
from taskmesh.celery_protocol import REDACTED
from taskmesh.contracts import Contract, Event
from taskmesh.contracts._base import TYPE_PATTERN
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, ScheduleManifest, TypeManifest
from taskmesh.database import sync_engine
from taskmesh.outbox import OutboxMessage
from taskmesh.settings import WorkerSettings
from taskmesh.worker import unit as units
from taskmesh.worker.schedules import announced_schedules
from taskmesh.worker.task import MeshTask, TransactionMode
from taskmesh.worker.unit import TaskSession

ProcessStart = Callable[[Any], None]
TaskDecorator = Callable[[Callable[..., Any]], MeshTask]
StartHook = TypeVar("StartHook", bound=ProcessStart)

# Messages that a worker holds of each queue for each task that it runs at a time.
PREFETCH_MULTIPLIER = 1

# Each process has a name of its own for its connections.
CUT = text(
    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = :name and pid <> pg_backend_pid()"
)


class OutboxProducer:
    """Stands where Celery expects kombu's producer, and receives the finished message for the outbox.

    So headers, serializer, routing and signals stay Celery's own work.
    """

    serializer = "json"

    class connection:  # noqa: N801 - the attribute that Celery reads
        """What Celery asks a connection for while it publishes."""

        recoverable_connection_errors = ()
        connection_errors = ()
        channel_errors = ()

        @staticmethod
        def _reraise_as_library_errors(*_: Any, **__: Any) -> AbstractContextManager[None]:
            return nullcontext()

    def __init__(self, unit: units.Unit, *, due_at: datetime | None = None) -> None:
        self._unit = unit
        self._due_at = due_at
        self.sent: list[OutboxMessage] = []

    def publish(
        self,
        body: Any,
        *,
        exchange: Any = "",
        routing_key: str = "",
        serializer: str = "json",
        headers: dict[str, Any],
        correlation_id: str | None = None,
        reply_to: str | None = None,
        priority: int | None = None,
        **_: Any,
    ) -> None:
        """Keep the message until the running transaction commits."""
        content_type, content_encoding, data = dumps(body, serializer)
        properties: dict[str, Any] = {
            "content_type": content_type,
            "content_encoding": content_encoding,
            "delivery_mode": 2,
            "correlation_id": correlation_id,
            "message_id": headers["id"],
            "type": headers["task"],
        }
        if reply_to:
            properties["reply_to"] = reply_to
        if priority is not None:
            properties["priority"] = priority
        expires_at = headers.get(celery_protocol.EXPIRES_HEADER)
        self.sent.append(
            OutboxMessage(
                exchange=getattr(exchange, "name", exchange),
                routing_key=routing_key,
                headers=headers,
                properties=properties,
                body=data if isinstance(data, bytes) else data.encode(),
                mandatory=True,
                due_at=self._due_at,
                expires_at=datetime.fromisoformat(expires_at) if expires_at else None,
                task_id=UUID(headers["id"]),
            )
        )
        self._unit.messages.append(self.sent[-1])


class WorkerApp(Celery):  # type: ignore[misc]  # Celery has no types
    """A worker service: its tasks, and how they are run.

    Declared at import, where nothing connects; configured in the entry point.

    Args:
        service: The first word of the types that it owns, and the name of its queue: `billing`.
        release: What the manifest says about the version of the code.
    """

    task_cls = MeshTask
    backend_cls = "taskmesh.worker.backend:NoResults"

    def __init__(self, service: str, *, release: str | None = None, **options: Any) -> None:
        # Not the process's current app: a program may hold several.
        super().__init__(service, set_as_current=False, **options)
        self.service = service
        self.release = release or telemetry.release()
        self._settings: WorkerSettings | None = None
        self._engine: Engine | None = None
        self._connections = ""
        self.is_stopping = False
        self._start_hooks: list[ProcessStart] = []

    # Declaring

    def task(
        self, *args: Any, transaction: TransactionMode = "whole", force_cancel: bool = False, **options: Any
    ) -> TaskDecorator:
        """Declare a task: `@app.task(IssueInvoice)`, or any of Celery's own forms with a `name`.

        Args:
            args: A contract, which names the task, is handed to it validated, and is announced with its JSON Schema.
                An `Event` makes the service a listener.
            transaction: "whole" runs the task inside its transaction. "last" runs it outside, for work that calls
                others: `self.transaction()` commits steps on the way, and the first use of `self.session` opens the
                transaction that is committed when the task returns.
            force_cancel: The process that runs the task may be killed when its cancellation is forced: nothing outside
                the database is left half done.
            options: Celery's.
        """
        options["transaction_mode"] = transaction
        if force_cancel:
            options["force_cancel"] = True
        # Celery would give the task to every other app of the process as well.
        options.setdefault("shared", False)
        if args and isinstance(args[0], type) and issubclass(args[0], Contract):
            contract = args[0]
            # Celery's check of arguments against the function's signature would ask for the one named `command`.
            options |= {"name": contract.type_name, "contract": contract, "bind": True, "typing": False}
            args = ()
        decorator: TaskDecorator = super().task(*args, **options)
        return decorator

    def on_process_start(self, hook: StartHook) -> StartHook:
        """Have `hook(settings)` called once in every process that runs tasks, before the first of them."""
        self._start_hooks.append(hook)
        return hook

    # Wiring

    def configure(self, settings: WorkerSettings) -> None:
        """Give the app its settings; called once, by the entry point.

        Raises:
            ValueError: A task is declared in a way that the mesh cannot keep its promises for.
        """
        if self.conf.task_always_eager:
            raise ValueError("task_always_eager runs a task before its sender commits; use real parts in tests")
        self._settings = settings
        self.conf.update(configuration(self.service, settings, listens=bool(self.listens_to())))
        self.manifest()

    @property
    def settings(self) -> Any:
        """The service's settings object, as the entry point built it.

        Raises:
            RuntimeError: The app is not configured.
        """
        if self._settings is None:
            raise RuntimeError(f"{self.service}: call configure(settings) in the entry point first")
        return self._settings

    def start_process(self) -> None:
        """Get this process ready to run tasks; in a pool child, after the fork."""
        self._engine = None
        for hook in self._start_hooks:
            hook(self.settings)
        # What they have made is the program's, too: see `taskmesh.garbage`.
        gc.freeze()

    def sessions(self) -> TaskSession:
        """A new session on this process's engine."""
        return TaskSession(self._engine_of_process())

    def connect(self) -> Connection:
        """A connection on this process's engine."""
        return self._engine_of_process().connect()

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection on this process's engine whose statements count at once."""
        with self.connect() as connection:
            # SQLAlchemy's isolation level says the same, and takes longer than the statement.
            driver_connection = connection.connection.driver_connection
            assert driver_connection is not None
            try:
                driver_connection.autocommit = True
                yield connection
                driver_connection.autocommit = False
            except BaseException:
                # Wherever a time limit has come: nobody may find a connection here that commits by itself.
                if not connection.closed and not connection.invalidated:
                    units.abandon(connection)
                raise

    def dispose_connections(self) -> None:
        """Close pooled connections, so that the next attempt meets a database and not a dead socket."""
        if self._engine is not None:
            self._engine.dispose()

    def cut_connections(self) -> None:
        """Have the database undo what this process is in the middle of; for one that ends while its threads work."""
        with self.autocommit() as connection:
            connection.execute(CUT, {"name": self._connections})
        self.dispose_connections()

    def _engine_of_process(self) -> Engine:
        if self._engine is None:
            settings = self.settings
            threads = settings.worker_concurrency if settings.worker_pool == "threads" else 1
            # In transaction mode "last" a task holds its lock, and beside it what it uses for its steps.
            kept = 2 if any(task.transaction_mode == "last" for task in self.mesh_tasks()) else 1
            # It may hold its last transaction and a short one of `self.transaction()`.
            self._connections = f"taskmesh-{uuid4().hex[:12]}"
            self._engine = sync_engine(
                settings.database_url,
                pool_size=kept * threads,
                max_overflow=threads,
                connect_args={"application_name": self._connections},
            )
        return self._engine

    # Announcing

    def mesh_tasks(self) -> list[MeshTask]:
        """The service's own tasks, without Celery's built-in ones."""
        self.finalize(auto=True)
        return [task for name, task in sorted(self.tasks.items()) if not name.startswith("celery.")]

    def listens_to(self) -> list[str]:
        """The event types that the service has a task for."""
        return [task.name for task in self.mesh_tasks() if kind_of(task) is TaskKind.EVENT]

    def manifest(self) -> Manifest:
        """What the service announces.

        Raises:
            ValueError: A task's name does not belong to the service.
        """
        types = tuple(self._announced(task) for task in self.mesh_tasks())
        schedules: tuple[ScheduleManifest, ...] = announced_schedules(self.conf.beat_schedule or {}, self.conf.timezone)
        return Manifest(
            service=self.service,
            release=self.release,
            types=types,
            schedules=schedules,
            announced_at=datetime.now(UTC),
        )

    def _announced(self, task: MeshTask) -> TypeManifest:
        kind = kind_of(task)
        if not TYPE_PATTERN.fullmatch(task.name):
            raise ValueError(f"task {task.name!r}: give it a name like '{self.service}.<noun>.<verb>'")
        if kind is TaskKind.COMMAND and not task.name.startswith(f"{self.service}."):
            raise ValueError(f"task {task.name!r}: the queue of {self.service!r} receives '{self.service}.#' only")
        contract = task.contract
        title, _, rest = ((contract.__doc__ if contract else task.__doc__) or "").strip().partition("\n")
        return TypeManifest(
            type=task.name,
            kind=kind,
            version=contract.version if contract else 1,
            queue=exchanges.queue_of(self.service, kind),
            title=title,
            description=" ".join(rest.split()),
            payload_schema=contract.model_json_schema() if contract else _schema_of(task),
            max_attempts=None if task.max_retries is None else task.max_retries + 1,
            time_limit_seconds=task.time_limit,
            force_cancel=task.force_cancel,
        )

    # Sending

    def producer_or_acquire(self, producer: Any = None) -> Any:
        """A producer for the outbox while a task runs: a group asks for one before it sends its members."""
        if isinstance(producer, OutboxProducer):
            return nullcontext(producer)
        unit = units.current()
        if unit is not None:
            return nullcontext(OutboxProducer(unit))
        return super().producer_or_acquire(producer)

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Celery's `send_task`, where every way of sending ends; inside a task the message goes to the outbox.

        Raises:
            ValueError: `task_id` is no UUID.
        """
        options.setdefault("task_id", str(uuid4()))
        if options["task_id"] is None:
            options["task_id"] = str(uuid4())
        _require_uuid(name, options["task_id"])
        options["argsrepr"] = options["kwargsrepr"] = REDACTED
        unit = units.current()
        self._address(name, options, unit)
        due_at = self._due_at(options.pop("countdown", None), options.pop("eta", None))
        # Outside a task no relay of ours would begin the trace.
        headers = options["headers"] = self._headers(name, options, due_at if unit else None)
        if unit is None:
            # Outside a task there is no transaction: publish at once, confirmed, and let the worker wait in its outbox.
            if due_at:
                headers[celery_protocol.ETA_HEADER] = due_at.isoformat()
            options["mandatory"] = True
            return super().send_task(name, args, kwargs, **options)
        for connected in ("producer", "connection", "redelivered"):
            options.pop(connected, None)
        return self._to_outbox(OutboxProducer(unit, due_at=due_at), name, args, kwargs, options)

    def _to_outbox(self, producer: OutboxProducer, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        request = self.current_worker_task.request if self.current_worker_task else None
        # Celery fills an empty parent in with the running task, and so makes a retried root its own parent.
        orphan = request is not None and options["task_id"] == request.id and not request.parent_id
        if orphan:
            options["parent_id"] = options["task_id"]
        result = super().send_task(name, args, kwargs, producer=producer, **options)
        if orphan:
            for message in producer.sent:
                message.headers["parent_id"] = None
        return result

    def _address(self, name: str, options: dict[str, Any], unit: units.Unit | None) -> None:
        request = self.current_worker_task.request if unit and self.current_worker_task else None
        if request is not None and options["task_id"] == request.id and name == self.current_worker_task.name:
            # A retry goes back to the queue that it came from: an event's other listeners must not see it again.
            kind = TaskKind((request.headers or {}).get(celery_protocol.KIND_HEADER, TaskKind.COMMAND))
            options["exchange"], options["routing_key"] = exchanges.DIRECT, exchanges.queue_of(self.service, kind)
            options.pop("queue", None)
            return
        if not options.get("queue") and not options.get("exchange"):
            options["exchange"], options["routing_key"] = exchanges.COMMANDS, name

    def _headers(self, name: str, options: dict[str, Any], due_at: datetime | None) -> dict[str, Any]:
        given = options.get("headers") or {}
        # The broker's own marks describe the old delivery; RabbitMQ 3.10 drops a message that still carries `x-death`.
        headers = {
            key: value
            for key, value in given.items()
            if not key.startswith("x-") and key not in celery_protocol.OF_ONE_MESSAGE
        }
        headers.setdefault(celery_protocol.KIND_HEADER, TaskKind.COMMAND.value)
        if "traceparent" not in headers:
            headers |= traces.due(due_at).headers()
        expires_at = self._expires_at(options.pop("expires", None) or getattr(self.tasks.get(name), "expires", None))
        # Celery would turn `expires` into a TTL that counts from publishing, and acknowledge expired tasks unseen.
        options["expires"] = None
        if expires_at:
            headers.setdefault(celery_protocol.EXPIRES_HEADER, expires_at.isoformat())
        return headers

    def _due_at(self, countdown: float | None, eta: datetime | str | None) -> datetime | None:
        if eta:
            moment: datetime = maybe_make_aware(maybe_iso8601(eta), self.timezone)
            return moment
        if countdown:
            return datetime.now(UTC) + timedelta(seconds=float(countdown))
        return None

    def _expires_at(self, expires: float | datetime | str | None) -> datetime | None:
        if isinstance(expires, int | float):
            return datetime.now(UTC) + timedelta(seconds=expires)
        return self._due_at(None, expires)


def configuration(service: str, settings: WorkerSettings, *, listens: bool) -> dict[str, Any]:
    """Celery's settings under which no message is ever dropped; each line is there for a reason of its own."""
    exchange = Exchange(exchanges.COMMANDS, type="topic", no_declare=True)
    names = [service, f"{service}.events"] if listens else [service]
    queues = [
        # The argument is read by Celery, which asks no broker, to choose per-consumer prefetch.
        Queue(name, exchange, routing_key=f"{name}.#", no_declare=True, queue_arguments={"x-queue-type": "quorum"})
        for name in names
    ]
    return {
        "broker_url": settings.amqp_url.get_secret_value(),
        "broker_use_ssl": _tls(settings.amqp_url),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # Heals a queue that is missing for a moment; the consumer time-out that it would loop on is far away by policy.
        "broker_channel_error_retry": True,
        "broker_transport_options": {"confirm_publish": True, "confirm_timeout": 30},
        "broker_heartbeat": 30,
        "worker_consumer": "taskmesh.worker.consumer:MeshConsumer",
        "worker_concurrency": settings.worker_concurrency,
        "worker_pool": settings.worker_pool,
        "worker_prefetch_multiplier": PREFETCH_MULTIPLIER,
        # In KiB. A leak ends in a new process, and not in the pod's whole worker being killed for it.
        "worker_max_memory_per_child": settings.worker_process_mib and settings.worker_process_mib * 1024,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        # A task goes on when the broker is lost: its outcome is committed, and its redelivery waits for it at the inbox
        # row. Killed while it waits for a provider or a mail relay, it would leave an outcome that nobody knows.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": settings.soft_shutdown_seconds,
        "worker_detect_quorum_queues": True,
        "task_queues": queues,
        "task_default_queue": service,
        "task_default_exchange": exchanges.COMMANDS,
        "task_default_exchange_type": "topic",
        "task_default_routing_key": service,
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_backend": None,
        "task_send_sent_event": False,
        "enable_utc": True,
        "timezone": "UTC",
    }


def _tls(amqp_url: SecretStr) -> dict[str, Any] | None:
    """For `amqps://`: the broker's certificate has to name its host, which the driver does not ask for by itself."""
    parts = urlsplit(amqp_url.get_secret_value())
    if parts.scheme != "amqps":
        return None
    return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname}


def kind_of(task: MeshTask) -> TaskKind:
    """An event's task listens; every other is a command's."""
    return TaskKind.EVENT if task.contract and issubclass(task.contract, Event) else TaskKind.COMMAND


def _require_uuid(name: str, task_id: str) -> None:
    try:
        UUID(task_id)
    except ValueError as error:
        raise ValueError(
            f"{name}: task_id {task_id!r} must be a UUID; the ledger and the inbox are keyed by it"
        ) from error


def _schema_of(task: MeshTask) -> dict[str, Any]:
    """The JSON Schema of a plain Celery task's keyword arguments; an open object when they cannot be described."""
    try:
        schema = TypeAdapter(task.run).json_schema()
    except PydanticUserError:
        return {"type": "object"}
    return schema if schema.get("type") == "object" else {"type": "object"}
