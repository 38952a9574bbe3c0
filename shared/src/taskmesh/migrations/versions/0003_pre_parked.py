"""Which failed tasks' messages are for the dead letters, so that a redelivery brings them there after all."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table inbox add column parked boolean not null default false")


def downgrade() -> None:
    op.execute("alter table inbox drop column parked")
