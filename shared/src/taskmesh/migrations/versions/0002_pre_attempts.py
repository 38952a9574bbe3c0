"""How often a task was started, and which tasks nobody wants any more."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Defaults, and no new state: the release before this one can go on reading and writing.
    op.execute(
        """
        alter table inbox
            add column starts integer not null default 0,
            add column started_at timestamptz,
            add column worker text
        """
    )
    # Every row is written at least twice: when its task starts, and when it ends.
    op.execute("alter table inbox set (fillfactor = 80)")
    op.execute(
        """
        create table cancellations (
            task_id uuid primary key,
            requested_at timestamptz not null,
            force boolean not null default false,
            reason text,
            received_at timestamptz not null default now()
        )
        """
    )
    # One row, made when the service is first paused.
    op.execute(
        """
        create table pauses (
            one boolean primary key default true check (one),
            paused_at timestamptz,
            changed_at timestamptz not null
        )
        """
    )


def downgrade() -> None:
    op.execute("drop table pauses")
    op.execute("drop table cancellations")
    op.execute("alter table inbox drop column starts, drop column started_at, drop column worker")
