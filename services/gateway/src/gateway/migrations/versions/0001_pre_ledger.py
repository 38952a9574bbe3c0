"""The ledger: tasks and their timeline, API keys, idempotency keys, manifests, dead letters and schedules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NOW = sa.text("now()")


def _time(name: str, *, nullable: bool = True, default_now: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=NOW if default_now else None)


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False, server_default="command"),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("sequence", sa.Integer, nullable=False, server_default="0"),
        sa.Column("service", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False, server_default="1"),
        sa.Column("payload", JSONB),
        sa.Column("result", JSONB),
        sa.Column("error", JSONB),
        sa.Column("priority", sa.SmallInteger),
        sa.Column("tags", ARRAY(sa.Text), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("parent_id", sa.Uuid),
        sa.Column("root_id", sa.Uuid, nullable=False),
        sa.Column("event_id", sa.Uuid),
        sa.Column("schedule_id", sa.Uuid),
        sa.Column("api_key_id", sa.Uuid),
        sa.Column("worker", sa.Text),
        _time("created_at", nullable=False),
        _time("due_at"),
        _time("expires_at"),
        _time("queued_at"),
        _time("started_at"),
        _time("finished_at"),
        _time("updated_at", nullable=False),
        sa.Column("trace_id", sa.Text),
        sa.CheckConstraint(
            "state IN ('scheduled','queued','running','retrying','succeeded','failed','cancelled','expired')",
            name="tasks_state_known",
        ),
    )
    op.create_index("tasks_created", "tasks", ["created_at", "id"])
    op.create_index("tasks_type", "tasks", ["type", "created_at", "id"])
    op.create_index("tasks_root", "tasks", ["root_id", "created_at", "id"])
    op.create_index("tasks_parent", "tasks", ["parent_id"], postgresql_where=sa.text("parent_id IS NOT NULL"))
    op.create_index(
        "tasks_schedule", "tasks", ["schedule_id", "created_at"], postgresql_where=sa.text("schedule_id IS NOT NULL")
    )
    op.create_index("tasks_tags", "tasks", ["tags"], postgresql_using="gin", postgresql_where=sa.text("tags <> '{}'"))
    op.create_index(
        "tasks_state", "tasks", ["state", "created_at", "id"], postgresql_where=sa.text("state <> 'succeeded'")
    )
    op.create_table(
        "task_events",
        sa.Column("seq", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("task_id", sa.Uuid, nullable=False),
        sa.Column("root_id", sa.Uuid, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        _time("at", nullable=False),
        sa.Column("detail", JSONB),
    )
    op.create_index("task_events_root", "task_events", ["root_id", "seq"])


def _create_access() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
        sa.Column("scopes", ARRAY(sa.Text), nullable=False),
        _time("created_at", nullable=False, default_now=True),
        _time("revoked_at"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("api_key_id", sa.Uuid, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("request_sha256", sa.LargeBinary, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        _time("created_at", nullable=False, default_now=True),
    )
    op.create_index("idempotency_keys_created", "idempotency_keys", ["created_at"])


def _create_messages() -> None:
    op.create_table(
        "manifests",
        sa.Column("service", sa.Text, primary_key=True),
        sa.Column("release", sa.Text, nullable=False),
        sa.Column("manifest", JSONB, nullable=False),
        _time("announced_at", nullable=False),
        _time("changed_at", nullable=False, default_now=True),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("task_id", sa.Uuid),
        sa.Column("type", sa.Text),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("exchange", sa.Text, nullable=False),
        sa.Column("routing_key", sa.Text, nullable=False),
        sa.Column("headers", JSONB, nullable=False),
        sa.Column("properties", JSONB, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        _time("died_at"),
        _time("received_at", nullable=False, default_now=True),
    )
    op.create_index("dead_letters_received", "dead_letters", ["received_at", "id"])
    op.create_index("dead_letters_task", "dead_letters", ["task_id"])


def _create_schedules() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("payload", JSONB, nullable=False),
        sa.Column("tags", ARRAY(sa.Text), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("priority", sa.SmallInteger),
        sa.Column("cron", sa.Text),
        sa.Column("interval_seconds", sa.Float),
        sa.Column("timezone", sa.Text, nullable=False, server_default="UTC"),
        sa.Column("misfire", sa.Text, nullable=False, server_default="once"),
        sa.Column("misfire_window_seconds", sa.Float, nullable=False, server_default="3600"),
        sa.Column("overlap", sa.Text, nullable=False, server_default="allow"),
        _time("starts_at"),
        _time("ends_at"),
        _time("next_fire_at"),
        _time("last_fire_at"),
        sa.Column("last_task_id", sa.Uuid),
        sa.Column("last_error", sa.Text),
        _time("retry_at"),
        _time("paused_at"),
        sa.Column("owner", sa.Text),
        sa.Column("api_key_id", sa.Uuid),
        _time("created_at", nullable=False, default_now=True),
        _time("updated_at", nullable=False, default_now=True),
        sa.UniqueConstraint("name", name="schedules_name"),
        sa.CheckConstraint("(cron IS NULL) <> (interval_seconds IS NULL)", name="schedules_one_rhythm"),
        sa.CheckConstraint("misfire IN ('skip','once','all')", name="schedules_misfire_known"),
        sa.CheckConstraint("overlap IN ('allow','skip')", name="schedules_overlap_known"),
    )
    op.create_index(
        "schedules_due",
        "schedules",
        ["next_fire_at"],
        postgresql_where=sa.text("paused_at IS NULL AND next_fire_at IS NOT NULL"),
    )
    op.create_table(
        "schedule_fires",
        sa.Column("schedule_id", sa.Uuid, primary_key=True),
        sa.Column("fire_at", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        _time("missed_until"),
        sa.Column("task_id", sa.Uuid),
        _time("fired_at", nullable=False, default_now=True),
    )
    op.create_index("schedule_fires_fired", "schedule_fires", ["fired_at"])


def upgrade() -> None:
    """Create every table of the gateway."""
    _create_tasks()
    _create_access()
    _create_messages()
    _create_schedules()


def downgrade() -> None:
    """Drop every table of the gateway."""
    for table in (
        "schedule_fires",
        "schedules",
        "dead_letters",
        "manifests",
        "idempotency_keys",
        "api_keys",
        "task_events",
        "tasks",
    ):
        op.drop_table(table)
