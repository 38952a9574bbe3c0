"""The gateway's tables: the ledger of tasks, what callers may do, what workers announced, and what went wrong.

SQLAlchemy Core, one metadata. Functions that touch these tables take an `AsyncConnection` first and never commit.
Outbox and inbox belong to the library and are migrated by it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData()

TASKS_CHANNEL = "gateway_tasks"
"""Notified with root ids (hexadecimal, joined by commas) whenever the timeline of their trees has grown."""

MANIFESTS_CHANNEL = "gateway_manifests"
"""Notified with the service's name whenever its manifest has changed."""

SCHEDULES_CHANNEL = "gateway_schedules"
"""Notified, without a payload, whenever the next fire of a schedule may have come nearer."""

SIGHTINGS_CHANNEL = "gateway_sightings"
"""Notified, without a payload, whenever a service has answered an inquiry."""

AUDITS_CHANNEL = "gateway_audits"
"""Notified by whoever wants an audit at once; the payload is the grace in seconds, or empty for the usual one."""

tasks = Table(
    "tasks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("type", Text, nullable=False),
    Column("kind", Text, nullable=False, server_default="command"),
    Column("state", Text, nullable=False),
    # How often it was started; 0 until the first run.
    Column("attempt", Integer, nullable=False, server_default="0"),
    # Orders attempts as LifecycleEvent.sequence does; guards against late events.
    Column("sequence", Integer, nullable=False, server_default="0"),
    Column("service", Text, nullable=False),
    Column("version", Integer, nullable=False, server_default="1"),
    # NULL for tasks that services started themselves: their payloads never reach the gateway.
    Column("payload", JSONB(none_as_null=True)),
    Column("result", JSONB(none_as_null=True)),
    Column("error", JSONB(none_as_null=True)),
    Column("priority", SmallInteger),
    Column("tags", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("parent_id", Uuid),
    # A task that nobody else caused is its own root.
    Column("root_id", Uuid, nullable=False),
    Column("event_id", Uuid),
    Column("schedule_id", Uuid),
    Column("api_key_id", Uuid),
    Column("worker", Text),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("due_at", DateTime(timezone=True)),
    Column("expires_at", DateTime(timezone=True)),
    Column("queued_at", DateTime(timezone=True)),
    Column("started_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True)),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    # The trace, and the span in it, that the task's message was created under.
    Column("trace_id", Text),
    Column("span_id", Text),
    Column("cancel_requested_at", DateTime(timezone=True)),
    # The API key.
    Column("cancel_requested_by", Uuid),
    Column("cancel_reason", Text),
    Column("cancel_forced", Boolean),
    # Another try of a task that failed is a task of its own, linked both ways.
    Column("retry_of", Uuid),
    Column("retried_as", Uuid),
    CheckConstraint(
        "state IN ('scheduled','queued','running','retrying','succeeded','failed','cancelled','expired')",
        name="tasks_state_known",
    ),
    Index("tasks_created", "created_at", "id"),
    Index("tasks_type", "type", "created_at", "id"),
    Index("tasks_root", "root_id", "created_at", "id"),
    Index("tasks_parent", "parent_id", postgresql_where=text("parent_id IS NOT NULL")),
    Index("tasks_schedule", "schedule_id", "created_at", postgresql_where=text("schedule_id IS NOT NULL")),
    Index("tasks_retry_of", "retry_of", postgresql_where=text("retry_of IS NOT NULL")),
    Index("tasks_tags", "tags", postgresql_using="gin", postgresql_where=text("tags <> '{}'")),
    # Most tasks succeed; people look for the others.
    Index("tasks_state", "state", "created_at", "id", postgresql_where=text("state <> 'succeeded'")),
    # All that is asked of a waiting task every few seconds, so that no row is read for it.
    Index(
        "tasks_waiting",
        "service",
        "type",
        "due_at",
        "created_at",
        postgresql_include=["state", "started_at", "updated_at"],
        postgresql_where=text("state IN ('scheduled','queued','retrying')"),
    ),
)

# No foreign key to tasks: every row is written in the transaction that has just written or locked its task, and the
# check would be the dearest part of a small task's timeline.
task_events = Table(
    "task_events",
    metadata,
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    Column("task_id", Uuid, nullable=False),
    Column("root_id", Uuid, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("detail", JSONB(none_as_null=True)),
    # Serves one task as well: a task's timeline is read through its root.
    Index("task_events_root", "root_id", "seq"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    # SHA-256 of the secret half; 256 random bits need no slow hash.
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("revoked_at", DateTime(timezone=True)),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("api_key_id", Uuid, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", LargeBinary, nullable=False),
    # The first answer, byte for byte: a repetition gets it whatever has become of the task since.
    Column("response", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("idempotency_keys_created", "created_at"),
)

manifests = Table(
    "manifests",
    metadata,
    Column("service", Text, primary_key=True),
    Column("release", Text, nullable=False),
    Column("manifest", JSONB, nullable=False),
    Column("announced_at", DateTime(timezone=True), nullable=False),
    # Changes only when the content does; a repeated announcement moves announced_at alone.
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    # SHA-256 over what makes the dead letter this one; a redelivery to the projector stores nothing twice.
    Column("fingerprint", LargeBinary, nullable=False, unique=True),
    Column("task_id", Uuid),
    Column("type", Text),
    Column("reason", Text, nullable=False),
    # Where it died: the queue that gave it up.
    Column("queue", Text, nullable=False),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("headers", JSONB, nullable=False),
    Column("properties", JSONB, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("died_at", DateTime(timezone=True)),
    Column("received_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # open, replayed or discarded.
    Column("state", Text, nullable=False, server_default="open"),
    Column("service", Text),
    # What is wrong with it: the code, the text and the exception's class name of its error.
    Column("code", Text),
    Column("error", Text),
    Column("exception", Text),
    # The same for dead letters that died of the same thing; people look after groups.
    Column("error_fingerprint", Text),
    Column("attempt", Integer),
    Column("trace_id", Text),
    Column("resolved_at", DateTime(timezone=True)),
    # The API key.
    Column("resolved_by", Uuid),
    Column("resolution_note", Text),
    Column("replay_task_id", Uuid),
    CheckConstraint("state IN ('open','replayed','discarded')", name="dead_letters_state_check"),
    Index("dead_letters_received", "received_at", "id"),
    Index("dead_letters_task", "task_id"),
    Index("dead_letters_open", "error_fingerprint", "received_at", "id", postgresql_where=text("state = 'open'")),
    # Which tasks have one: audits ask that, and read no letter for it.
    Index("dead_letters_open_task", "task_id", postgresql_where=text("state = 'open'")),
    Index("dead_letters_open_service", "service", "received_at", postgresql_where=text("state = 'open'")),
    Index("dead_letters_resolved", "resolved_at", postgresql_where=text("state <> 'open'")),
)

schedules = Table(
    "schedules",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("tags", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("priority", SmallInteger),
    # Exactly one of the two.
    Column("cron", Text),
    Column("interval_seconds", Float),
    Column("timezone", Text, nullable=False, server_default="UTC"),
    # What becomes of fires missed in downtime: skip, once (run one for all), or all (within the window).
    Column("misfire", Text, nullable=False, server_default="once"),
    Column("misfire_window_seconds", Float, nullable=False, server_default="3600"),
    # While the last run is still going: allow, or skip.
    Column("overlap", Text, nullable=False, server_default="allow"),
    Column("starts_at", DateTime(timezone=True)),
    Column("ends_at", DateTime(timezone=True)),
    # NULL while paused, and when no fire is left.
    Column("next_fire_at", DateTime(timezone=True)),
    Column("last_fire_at", DateTime(timezone=True)),
    Column("last_task_id", Uuid),
    # Why the last try to fire came to nothing, and when to try again; NULL while all is well.
    Column("last_error", Text),
    Column("retry_at", DateTime(timezone=True)),
    Column("paused_at", DateTime(timezone=True)),
    # The span of the request that made or last replaced it; NULL for an announced one.
    Column("traceparent", Text),
    # The service that announced it; NULL for a schedule made over HTTP.
    Column("owner", Text),
    Column("api_key_id", Uuid),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    UniqueConstraint("name", name="schedules_name"),
    CheckConstraint("(cron IS NULL) <> (interval_seconds IS NULL)", name="schedules_one_rhythm"),
    CheckConstraint("misfire IN ('skip','once','all')", name="schedules_misfire_known"),
    CheckConstraint("overlap IN ('allow','skip')", name="schedules_overlap_known"),
    Index("schedules_due", "next_fire_at", postgresql_where=text("paused_at IS NULL AND next_fire_at IS NOT NULL")),
)

schedule_fires = Table(
    "schedule_fires",
    metadata,
    # The primary key is what makes a slot fire once, whoever fires it.
    Column("schedule_id", Uuid, primary_key=True),
    Column("fire_at", DateTime(timezone=True), primary_key=True),
    # submitted, or skipped for a reason: missed, overlap.
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    # The newest of the missed fires that this row stands for.
    Column("missed_until", DateTime(timezone=True)),
    Column("task_id", Uuid),
    Column("fired_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("schedule_fires_fired", "fired_at"),
)

broker_status = Table(
    "broker_status",
    metadata,
    # One row.
    Column("one", Boolean, primary_key=True, server_default="true"),
    Column("reachable", Boolean, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("observed_at", DateTime(timezone=True), nullable=False),
    Column("error", Text),
    CheckConstraint("one", name="broker_status_one_check"),
)

broker_queues = Table(
    "broker_queues",
    metadata,
    Column("queue", Text, primary_key=True),
    Column("service", Text, nullable=False),
    Column("ready", BigInteger, nullable=False),
    Column("unacknowledged", BigInteger, nullable=False),
    Column("consumers", Integer, nullable=False),
    Column("observed_at", DateTime(timezone=True), nullable=False),
)

# The newest answer of each service about a task, or about an event that tasks listen to.
sightings = Table(
    "sightings",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("service", Text, primary_key=True),
    Column("inquiry_id", Uuid, nullable=False),
    Column("state", Text, nullable=False),
    Column("sequence", Integer),
    Column("starts", Integer),
    Column("started_at", DateTime(timezone=True)),
    Column("worker", Text),
    Column("due_at", DateTime(timezone=True)),
    Column("alive", Boolean),
    Column("seen_at", DateTime(timezone=True), nullable=False),
    Index("sightings_seen", "seen_at"),
)

audits = Table(
    "audits",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("finished_at", DateTime(timezone=True)),
    # Accepted is the sum of the other five.
    Column("accepted", BigInteger, nullable=False, server_default="0"),
    Column("waiting", BigInteger, nullable=False, server_default="0"),
    Column("running", BigInteger, nullable=False, server_default="0"),
    Column("finished", BigInteger, nullable=False, server_default="0"),
    Column("dead", BigInteger, nullable=False, server_default="0"),
    Column("unaccounted", BigInteger, nullable=False, server_default="0"),
    Column("redriven", BigInteger, nullable=False, server_default="0"),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'")),
)

# Tasks that an audit could not account for. Suspects first: an audit later they are named, or accounted for again.
unaccounted_tasks = Table(
    "unaccounted_tasks",
    metadata,
    Column("task_id", Uuid, primary_key=True),
    Column("service", Text, nullable=False),
    Column("type", Text, nullable=False),
    # What is known of it; a verdict needs two audits that find the same.
    Column("mark", Text, nullable=False),
    # NULL once it is accounted for again; the row then only remembers how often it was re-driven.
    Column("since", DateTime(timezone=True)),
    # NULL until it is named.
    Column("confirmed_at", DateTime(timezone=True)),
    Column("last_seen_at", DateTime(timezone=True)),
    Column("last_seen_where", Text),
    Column("redriven_at", DateTime(timezone=True)),
    Column("redrives", Integer, nullable=False, server_default="0"),
)

# How long attempts of each type take, as the projector hears it; see gateway/run_times.py.
run_times = Table(
    "run_times",
    metadata,
    Column("service", Text, primary_key=True),
    Column("type", Text, primary_key=True),
    Column("runs", BigInteger, nullable=False),
    Column("mean_seconds", Float, nullable=False),
)

services = Table(
    "services",
    metadata,
    Column("service", Text, primary_key=True),
    # NULL while its workers take tasks.
    Column("paused_at", DateTime(timezone=True)),
    Column("paused_by", Uuid),
    Column("pause_reason", Text),
)
