"""Who wanted a task cancelled, and which task is another try of which."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        alter table tasks
            add column cancel_requested_at timestamptz,
            add column cancel_requested_by uuid,
            add column cancel_reason text,
            add column cancel_forced boolean,
            add column retry_of uuid,
            add column retried_as uuid
        """
    )
    op.execute("create index tasks_retry_of on tasks (retry_of) where retry_of is not null")


def downgrade() -> None:
    op.execute("drop index tasks_retry_of")
    op.execute(
        """
        alter table tasks
            drop column cancel_requested_at,
            drop column cancel_requested_by,
            drop column cancel_reason,
            drop column cancel_forced,
            drop column retry_of,
            drop column retried_as
        """
    )
