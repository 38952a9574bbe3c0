"""What is wrong with a dead letter, and what a person has done about it."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        alter table dead_letters
            add column state text not null default 'open' check (state in ('open', 'replayed', 'discarded')),
            add column service text,
            add column code text,
            add column error text,
            add column exception text,
            add column error_fingerprint text,
            add column attempt integer,
            add column trace_id text,
            add column resolved_at timestamptz,
            add column resolved_by uuid,
            add column resolution_note text,
            add column replay_task_id uuid
        """
    )
    op.execute(
        "create index dead_letters_open on dead_letters (error_fingerprint, received_at, id) where state = 'open'"
    )
    op.execute("create index dead_letters_open_task on dead_letters (task_id) where state = 'open'")
    op.execute("create index dead_letters_resolved on dead_letters (resolved_at) where state <> 'open'")


def downgrade() -> None:
    op.execute("drop index dead_letters_resolved")
    op.execute("drop index dead_letters_open_task")
    op.execute("drop index dead_letters_open")
    op.execute(
        """
        alter table dead_letters
            drop column state,
            drop column service,
            drop column code,
            drop column error,
            drop column exception,
            drop column error_fingerprint,
            drop column attempt,
            drop column trace_id,
            drop column resolved_at,
            drop column resolved_by,
            drop column resolution_note,
            drop column replay_task_id
        """
    )
