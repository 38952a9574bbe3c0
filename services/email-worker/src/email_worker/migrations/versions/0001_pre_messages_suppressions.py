"""Messages, their contents, and suppressions."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create table messages (
            id uuid primary key,
            template text not null,
            to_address text not null,
            header_id text not null,
            state text not null check (
                state in ('composed', 'claimed', 'in_data', 'deferred', 'ambiguous', 'accepted', 'suppressed', 'failed')
            ),
            attempt integer not null default 0,
            deferrals integer not null default 0,
            resends integer not null default 0,
            not_before timestamptz,
            reason text,
            last_code integer,
            last_text text,
            created_at timestamptz not null,
            updated_at timestamptz not null default now(),
            check ((state = 'failed') = (reason is not null)),
            check (state not in ('in_data', 'deferred', 'ambiguous') or not_before is not null)
        )
        """
    )
    op.execute(
        """
        create table message_contents (
            message_id uuid primary key references messages on delete cascade,
            mime bytea not null
        )
        """
    )
    # Mostly base64 of files that are compressed already: trying to compress it again costs more than it saves.
    op.execute("alter table message_contents alter column mime set storage external")
    # Every change of state must stay on its page: the columns that change are in no index.
    op.execute("alter table messages set (fillfactor = 80)")
    op.execute(
        """
        create table suppressions (
            address_sha256 bytea primary key check (length(address_sha256) = 32),
            reason text not null,
            message_id uuid not null,
            created_at timestamptz not null default now()
        )
        """
    )


def downgrade() -> None:
    op.execute("drop table suppressions")
    op.execute("drop table message_contents")
    op.execute("drop table messages")
