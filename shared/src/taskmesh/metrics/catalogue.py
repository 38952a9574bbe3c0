"""Every metric of the mesh. docs/telemetry.md has them as a table; tests hold both against what a run exports."""

from __future__ import annotations

from taskmesh import exchanges
from taskmesh.contracts._base import TYPE_MAX_LENGTH, TYPE_PATTERN
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.metrics.instruments import Attribute, Counter, Gauge, Histogram

TYPE = Attribute("type", pattern=rf"(?=.{{1,{TYPE_MAX_LENGTH}}}$){TYPE_PATTERN.pattern}", limit=200)
SERVICE = Attribute("service", pattern=r"[a-z][a-z0-9-]{0,62}", limit=50)
STATE = Attribute("state", values=[state.value for state in TaskState])
CODE = Attribute("code", pattern=r"[a-z][a-z0-9_]{0,62}", limit=100)
REASON = Attribute("reason", values=["rejected", "delivery_limit", "expired", "maxlen", "malformed", "unknown"])
QUEUE = Attribute("queue", pattern=r"[a-z][a-z0-9-]{0,62}(\.[a-z-]{1,20})?", limit=200)
EXCHANGE = Attribute(
    "exchange",
    values=[exchanges.COMMANDS, exchanges.EVENTS, exchanges.LIFECYCLE, exchanges.DIRECT, exchanges.DEAD],
)
OUTCOME = Attribute("outcome")

# The life of tasks

TASKS_ACCEPTED = Counter(
    "taskmesh.tasks.accepted", "{task}", "Tasks that the gateway has committed to, once it has.", TYPE, SERVICE
)
TASK_TRANSITIONS = Counter(
    "taskmesh.task.transitions",
    "{transition}",
    "Steps of tasks that the ledger has taken, by the state that they led to.",
    TYPE,
    SERVICE,
    STATE,
    CODE,
)
TASK_DURATION = Histogram(
    "taskmesh.task.duration", "s", "From when a task was wanted to its end.", TYPE, SERVICE, STATE
)
TASK_WAIT_DURATION = Histogram(
    "taskmesh.task.wait.duration", "s", "From when a task was due to its first start.", TYPE, SERVICE
)
TASK_RUN_DURATION = Histogram(
    "taskmesh.task.run.duration", "s", "From the start of an attempt to its end.", TYPE, SERVICE, STATE
)
PROJECTOR_LAG = Histogram(
    "taskmesh.projector.lag", "s", "From when something happened to a task until the ledger says so."
)
DEAD_LETTERS_STORED = Counter(
    "taskmesh.dead_letters.stored", "{message}", "Messages that could not be run, once they are kept.",
    SERVICE, REASON, CODE,
)  # fmt: skip

# Requests

HTTP_SERVER_DURATION = Histogram(
    "http.server.request.duration",
    "s",
    "Duration of HTTP server requests.",
    Attribute("http.request.method", pattern=r"_OTHER|[A-Z]{3,7}", limit=10),
    # The gateway's own templates, never a path that a caller made up.
    Attribute("http.route", pattern=r"/.{0,99}", limit=100),
    Attribute("http.response.status_code", pattern=r"[1-5]\d\d", limit=40),
    Attribute("url.scheme", values=["http", "https"]),
)

# The state of the mesh, from the reconciler that leads

UNACCOUNTED_TASKS = Gauge(
    "taskmesh.unaccounted_tasks", "{task}", "Tasks that nobody can account for, at the last audit."
)
TASKS = Gauge(
    "taskmesh.tasks",
    "{task}",
    "Tasks of the ledger by place, at the last audit.",
    Attribute("place", values=["accepted", "waiting", "running", "finished", "dead"]),
)
QUEUE_MESSAGES = Gauge(
    "taskmesh.queue.messages",
    "{message}",
    "Messages in a queue of the mesh.",
    QUEUE,
    Attribute("state", values=["ready", "unacknowledged"]),
)
QUEUE_CONSUMERS = Gauge("taskmesh.queue.consumers", "{consumer}", "Consumers of a queue of the mesh.", QUEUE)
OLDEST_TASK_AGE = Gauge(
    "taskmesh.service.oldest_task.age", "s", "How long the oldest task has been due that has not started.", SERVICE
)
WORK_OUTSTANDING = Gauge(
    "taskmesh.service.work_outstanding", "s", "Run time of the tasks that wait or are due within a minute.", SERVICE
)
DEAD_LETTERS_OPEN = Gauge("taskmesh.dead_letters.open", "{message}", "Dead letters that wait for a person.", SERVICE)
DEAD_LETTERS_OLDEST_AGE = Gauge(
    "taskmesh.dead_letters.oldest.age", "s", "How long the oldest open dead letter has been kept.", SERVICE
)
BROKER_REACHABLE = Gauge("taskmesh.broker.reachable", "1", "1 while the broker's management API answers, else 0.")

# Relays and the scheduler

OUTBOX_LAG = Gauge("taskmesh.outbox.lag", "s", "How long the oldest row of the outbox has been due; 0 without any.")
OUTBOX_DWELL = Histogram("taskmesh.outbox.dwell", "s", "From when a message was due to the broker's confirm.", EXCHANGE)
MESSAGES_PUBLISHED = Counter(
    "taskmesh.messages.published",
    "{message}",
    "Messages offered to the broker, by its answer.",
    EXCHANGE,
    Attribute("outcome", values=["confirmed", "returned", "refused", "unknown"]),
)
SCHEDULE_LATENESS = Histogram("taskmesh.schedule.lateness", "s", "From when a schedule was due to its task's commit.")
SCHEDULE_FIRES = Counter(
    "taskmesh.schedule.fires",
    "{fire}",
    "Fires of schedules, by what became of them.",
    Attribute("outcome", values=["submitted", "skipped"]),
)

# Workers

WORKER_IN_FLIGHT = Gauge("taskmesh.worker.in_flight", "{task}", "Tasks that the worker runs.")
WORKER_SLOTS = Gauge("taskmesh.worker.slots", "{slot}", "Tasks that the worker can run at a time.")
PROCESS_DURATION = Histogram(
    "messaging.process.duration",
    "s",
    "Duration of processing operation.",
    Attribute("messaging.system", values=["rabbitmq"]),
    Attribute("messaging.operation.name", values=["process"]),
    Attribute("messaging.destination.name", pattern=r"[a-z][a-z0-9-]{0,62}(\.[a-z-]{1,20})?"),
    Attribute("taskmesh.task.type", pattern=TYPE_PATTERN.pattern, limit=200),
    Attribute("taskmesh.outcome"),
    Attribute("error.type", pattern=r"[A-Za-z_][\w.]{0,127}", limit=100),
)
SMTP_REPLIES = Counter(
    "taskmesh.smtp.replies",
    "{reply}",
    "Last words of mail relays about a mail.",
    Attribute("reply_class", pattern=r"[1-9]xx|none", limit=10),
    Attribute("stage", values=["session", "mail", "rcpt", "data", "answer"]),
    OUTCOME,
)
BILLING_INVOICES = Counter(
    "taskmesh.billing.invoices",
    "{invoice}",
    "Invoices that were issued, once they are committed.",
    Attribute("currency", pattern=r"[A-Z]{3}", limit=200),
)

# Every process

BUILD_INFO = Gauge(
    "taskmesh.build_info",
    "1",
    "Always 1; the attributes say what runs.",
    Attribute("version"),
    Attribute("python_version"),
)
TELEMETRY_DROPPED = Counter(
    "taskmesh.telemetry.dropped",
    "{item}",
    "Spans and measurements that were not exported, because there was no room for them.",
    Attribute("signal", values=["traces", "metrics"]),
)
