"""A worker service whose one task leaves one row: `python bench/noop_service.py setup|worker`."""

from __future__ import annotations

from sqlalchemy import text

from taskmesh.contracts import Command
from taskmesh.worker import MeshTask, WorkerApp, main

app = WorkerApp("bench")

EFFECTS = "create table if not exists effects (task_id uuid primary key)"


class DoNothing(Command, type="bench.nothing.do"):
    """Leaves one row."""

    name: str = "nothing"


@app.task(DoNothing)
def do_nothing(self: MeshTask, command: DoNothing) -> None:  # noqa: ARG001 - nothing is in it
    """Leave one row: twice would violate its key."""
    self.session.execute(text("insert into effects values (:task_id)"), {"task_id": self.task_id})


if __name__ == "__main__":
    main(app)
