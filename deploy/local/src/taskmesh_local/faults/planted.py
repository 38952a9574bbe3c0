"""Bugs that a campaign has to find: a role is run with one of them in it.

    python -m taskmesh_local.faults.planted no-inbox billing_worker worker

patches the library in this process and then runs the role's own program, so the code of the product holds no trace of
it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any
from uuid import UUID

from taskmesh_local.roles import Role


class Bug(StrEnum):
    """What can be planted."""

    ACK_BEFORE_COMMIT = "ack-before-commit"
    """A worker acknowledges a task when it begins it."""
    NO_INBOX = "no-inbox"
    """A worker does not ask whether it has done a task already."""
    DELETE_BEFORE_CONFIRM = "delete-before-confirm"
    """A relay deletes its rows before the broker has answered."""


def through(role: Role, bug: Bug) -> Role:
    """The role with the bug in it."""
    return replace(role, through=(__name__, bug.value))


def acknowledge_before_commit() -> None:
    """Take the acknowledgement from the end of a task to its beginning, as Celery does by default."""
    from taskmesh.worker.task import MeshTask

    MeshTask.acks_late = False


def skip_the_inbox() -> None:
    """Let every delivery run, whatever the inbox says of its task."""
    from sqlalchemy import Connection

    from taskmesh import inbox
    from taskmesh.inbox import Claim, InboxState

    check_in, claim = inbox.check_in, inbox.claim

    def check_in_anyway(
        connection: Connection, task_id: UUID, sequence: int, worker: str, *, again: bool = False
    ) -> int:
        return check_in(connection, task_id, sequence, worker, again=again) or 1

    def claim_anyway(connection: Connection, task_id: UUID, sequence: int, state: InboxState) -> Claim:
        return claim(connection, task_id, sequence, state) or Claim(is_cancelled=False)

    inbox.check_in, inbox.claim = check_in_anyway, claim_anyway


def delete_before_confirm() -> None:
    """Commit the deletion of the rows that are due, and only then publish them."""
    from sqlalchemy import delete
    from sqlalchemy.ext.asyncio import AsyncConnection

    from taskmesh.outbox import outbox
    from taskmesh.relay import Relay

    claim = Relay._claim  # noqa: SLF001 - there is no other way in

    async def claim_and_delete(self: Relay, _: AsyncConnection) -> Any:
        async with self._engine.begin() as first:
            claimed = await claim(self, first)
            due = [row.id for row, is_expired in claimed if not is_expired]
            await first.execute(delete(outbox).where(outbox.c.id.in_(due)))
        return claimed

    Relay._claim = claim_and_delete  # type: ignore[assignment, method-assign] # noqa: SLF001 - as above


PATCHES: dict[Bug, Callable[[], None]] = {
    Bug.ACK_BEFORE_COMMIT: acknowledge_before_commit,
    Bug.NO_INBOX: skip_the_inbox,
    Bug.DELETE_BEFORE_CONFIRM: delete_before_confirm,
}


def main(arguments: Sequence[str]) -> None:
    """Plant a bug in this process and run a package in it."""
    bug, package, *rest = arguments
    PATCHES[Bug(bug)]()
    sys.argv = [package, *rest]
    runpy.run_module(package, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
