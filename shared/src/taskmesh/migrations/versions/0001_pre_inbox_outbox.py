"""Inbox and outbox, and the notification that wakes the relay."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create table outbox (
            id bigint generated always as identity primary key,
            due_at timestamptz not null default now(),
            exchange text not null,
            routing_key text not null,
            mandatory boolean not null,
            headers jsonb not null,
            properties jsonb not null,
            body bytea not null,
            task_id uuid,
            expires_at timestamptz,
            created_at timestamptz not null default now(),
            failures integer not null default 0,
            last_error text
        )
        """
    )
    op.execute("create index outbox_due on outbox (due_at, id)")
    op.execute("create index outbox_task on outbox (task_id)")
    # The table is a queue: rows live for milliseconds, so it must be vacuumed by count and not by share.
    op.execute(
        """
        alter table outbox set (
            autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0
        )
        """
    )
    op.execute(
        """
        create table inbox (
            task_id uuid primary key,
            sequence integer not null,
            state text not null check (state in ('waiting', 'succeeded', 'failed', 'expired', 'cancelled')),
            updated_at timestamptz not null default now()
        )
        """
    )
    # Once a statement, not once a row; PostgreSQL folds equal notifications of one transaction into one.
    op.execute(
        """
        create function notify_outbox() returns trigger language plpgsql as $$
        begin
            perform pg_notify('taskmesh_outbox', '');
            return null;
        end
        $$
        """
    )
    op.execute(
        "create trigger outbox_inserted after insert on outbox for each statement execute function notify_outbox()"
    )


def downgrade() -> None:
    op.execute("drop table outbox")
    op.execute("drop table inbox")
    op.execute("drop function notify_outbox")
