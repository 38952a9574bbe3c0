"""What the reconciler sees: the broker's queues, the services' inboxes, and the tasks that nobody can account for."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create table broker_status (
            one boolean primary key default true check (one),
            reachable boolean not null,
            since timestamptz not null,
            observed_at timestamptz not null,
            error text
        )
        """
    )
    op.execute(
        """
        create table broker_queues (
            queue text primary key,
            service text not null,
            ready bigint not null,
            unacknowledged bigint not null,
            consumers integer not null,
            observed_at timestamptz not null
        )
        """
    )
    op.execute(
        """
        create table sightings (
            task_id uuid not null,
            service text not null,
            inquiry_id uuid not null,
            state text not null,
            sequence integer,
            starts integer,
            started_at timestamptz,
            worker text,
            due_at timestamptz,
            alive boolean,
            seen_at timestamptz not null,
            primary key (task_id, service)
        )
        """
    )
    op.execute("create index sightings_seen on sightings (seen_at)")
    op.execute(
        """
        create table audits (
            id bigint generated always as identity primary key,
            started_at timestamptz not null,
            finished_at timestamptz,
            accepted bigint not null default '0',
            waiting bigint not null default '0',
            running bigint not null default '0',
            finished bigint not null default '0',
            dead bigint not null default '0',
            unaccounted bigint not null default '0',
            redriven bigint not null default '0',
            detail jsonb not null default '{}'
        )
        """
    )
    op.execute(
        """
        create table unaccounted_tasks (
            task_id uuid primary key,
            service text not null,
            type text not null,
            mark text not null,
            since timestamptz,
            confirmed_at timestamptz,
            last_seen_at timestamptz,
            last_seen_where text,
            redriven_at timestamptz,
            redrives integer not null default 0
        )
        """
    )
    op.execute(
        """
        create table services (
            service text primary key,
            paused_at timestamptz,
            paused_by uuid,
            pause_reason text
        )
        """
    )


def downgrade() -> None:
    for table in ("services", "unaccounted_tasks", "audits", "sightings", "broker_queues", "broker_status"):
        op.execute(f"drop table {table}")
