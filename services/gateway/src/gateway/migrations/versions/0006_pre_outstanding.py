"""How long tasks of each type run, and indexes under which waiting tasks and open dead letters are counted."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create table run_times (
            service text not null,
            type text not null,
            runs bigint not null,
            mean_seconds double precision not null,
            primary key (service, type)
        )
        """
    )
    # Without a lock that would keep tasks from being accepted while millions of rows are read.
    with op.get_context().autocommit_block():
        # What an interrupted attempt has left is not valid.
        op.execute("drop index concurrently if exists tasks_waiting")
        op.execute(
            """
            create index concurrently tasks_waiting on tasks (service, type, due_at, created_at)
            include (state, started_at, updated_at)
            where state in ('scheduled', 'queued', 'retrying')
            """
        )
        op.execute("drop index concurrently if exists dead_letters_open_service")
        op.execute(
            """
            create index concurrently dead_letters_open_service on dead_letters (service, received_at)
            where state = 'open'
            """
        )


def downgrade() -> None:
    op.execute("drop index dead_letters_open_service")
    op.execute("drop index tasks_waiting")
    op.execute("drop table run_times")
