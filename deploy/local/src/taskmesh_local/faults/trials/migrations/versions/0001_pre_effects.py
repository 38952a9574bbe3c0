"""Effects, committed steps, and runs."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    # No primary key on purpose: a doubled effect must be seen, not refused.
    op.execute("create table effects (task_id uuid not null, at timestamptz not null default clock_timestamp())")
    op.execute("create table steps (task_id uuid primary key)")
    op.execute("create table runs (task_id uuid primary key, count integer not null)")
