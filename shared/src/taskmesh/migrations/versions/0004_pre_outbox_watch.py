"""Writers wake a relay only while none keeps watch: a commit with a notification waits for every other such commit."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create unlogged table outbox_watch (
            is_one boolean primary key default true constraint outbox_watch_is_one check (is_one),
            until timestamptz not null
        )
        """
    )
    _notify_unless("exists (select from outbox_watch where until > clock_timestamp())")


def downgrade() -> None:
    _notify_unless("false")
    op.execute("drop table outbox_watch")


def _notify_unless(condition: str) -> None:
    op.execute(
        f"""
        create or replace function notify_outbox() returns trigger language plpgsql as $$
        begin
            if not {condition} then
                perform pg_notify('taskmesh_outbox', '');
            end if;
            return null;
        end
        $$
        """
    )
