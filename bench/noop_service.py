"""A worker service whose one task leaves one row: `python bench/noop_service.py setup|worker|relay`."""

from __future__ import annotations

from sqlalchemy import text

from taskmesh.contracts import Command
from taskmesh.worker import MeshTask, WorkerApp, main

app = WorkerApp("bench")

EFFECTS = "create table if not exists effects (task_id uuid primary key, sent_at double precision)"
"""Where tasks leave their rows. That of a benchmark's caller says when it sent the request, in seconds since 1970."""


class DoNothing(Command, type="bench.nothing.do"):
    """Leaves one row."""

    name: str = "nothing"
    sent_at: float | None = None


@app.task(DoNothing)
def do_nothing(self: MeshTask, command: DoNothing) -> None:
    """Leave one row: twice would violate its key."""
    values = {"task_id": self.task_id, "sent_at": command.sent_at}
    self.session.execute(text("insert into effects values (:task_id, :sent_at)"), values)


if __name__ == "__main__":
    main(app)
