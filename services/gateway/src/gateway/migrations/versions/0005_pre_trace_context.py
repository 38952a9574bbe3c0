"""Which span a task and a schedule were created under, so that later traces can be linked to it."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table tasks add column span_id text")
    op.execute("alter table schedules add column traceparent text")


def downgrade() -> None:
    op.execute("alter table schedules drop column traceparent")
    op.execute("alter table tasks drop column span_id")
