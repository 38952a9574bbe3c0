"""The tables of the entries.

Revision ID: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("create table entries (id uuid primary key, task_id uuid, account text, posted_at timestamptz)")
    op.execute("create table claims (task_id uuid primary key, account text)")
