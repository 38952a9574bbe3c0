"""`taskmesh submit`, `get`, `wait`, `list` and `tail`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Annotated, Any
from uuid import UUID

import typer

from taskmesh.cli import inputs, output
from taskmesh.cli.failures import ExitCode
from taskmesh.client import StateChange, Task, Taskmesh, TaskState
from taskmesh.client.operations import Filter, SubmitOptions

PATIENCE_SECONDS = 10.0
TAIL_POLL_SECONDS = 1.0
TAIL_START = 10
TAIL_WINDOW = 200

TaskId = Annotated[UUID, typer.Argument(metavar="ID", help="The task's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs instead of tables.")]
TypeFilter = Annotated[str | None, typer.Option("--type", help="Only tasks of this type.")]
StateFilter = Annotated[TaskState | None, typer.Option("--state", help="Only tasks in this state.")]
TagFilter = Annotated[str | None, typer.Option("--tag", help="Only tasks with this tag.")]


def connect() -> Taskmesh:
    """The client of one command: a person waits for it, so it gives up sooner than a service would."""
    return Taskmesh.from_env(timeout=PATIENCE_SECONDS)


def submit(
    type_name: Annotated[str, typer.Argument(metavar="TYPE", help="Such as billing.invoice.issue.")],
    *,
    payload: Annotated[str | None, typer.Option(help="The payload as JSON, @file, or - for standard input.")] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="One field: buyer.name=Ada, or due_days:=30 for JSON.")
    ] = None,
    at: Annotated[str | None, typer.Option(help="Not before this moment.")] = None,
    delay: Annotated[str | None, typer.Option(help="Not before this long from now: 90s, 5m, 2h, 1d.")] = None,
    expires: Annotated[str | None, typer.Option(help="Not at all after this moment, or this long from now.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            min=0, max=9, help="Sent with the message; RabbitMQ 4 prefers higher ones, RabbitMQ 3 ignores it."
        ),
    ] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="To find the task by; may be repeated.")] = None,
    wait: Annotated[str | None, typer.Option(help="Wait this long for the task to finish.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Your own name for this submission: the same key gives the same task.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a task."""
    options: SubmitOptions = {"priority": priority, "tags": tags or [], "idempotency_key": idempotency_key}
    if at is not None:
        options["run_at"] = inputs.moment(at)
    if delay is not None:
        options["delay"] = inputs.duration(delay)
    if expires is not None:
        options["expires_at"] = inputs.moment_or_duration(expires)
    if wait is not None:
        options["wait"] = inputs.duration(wait)
    if at is not None and delay is not None:
        raise typer.BadParameter("give --at or --delay, not both")
    content = inputs.payload(payload, fields or [])
    with connect() as mesh:
        task = mesh.submit(type_name, content, **options)
    # What was typed a moment ago is not shown again.
    shown = task.model_copy(update={"payload": None})
    output.print_json(task) if as_json else output.print_task(shown)
    if wait is not None:
        _exit_with_state([task])


def get(task_id: TaskId, *, as_json: AsJson = False) -> None:
    """Show a task."""
    with connect() as mesh:
        task = mesh.get(task_id)
    output.print_json(task) if as_json else output.print_task(task)


def wait(
    task_id: TaskId,
    *,
    timeout: Annotated[str, typer.Option(help="How long at most: 90s, 5m, 2h.")] = "5m",
    tree: Annotated[bool, typer.Option("--tree", help="And for everything that followed from the task.")] = False,
    as_json: AsJson = False,
) -> None:
    """Wait until a task is finished; the exit code is 1 unless it succeeded."""
    with connect() as mesh:
        if tree:
            tasks = mesh.wait_tree(task_id, inputs.duration(timeout))
            output.print_json(tasks) if as_json else output.print_tree(tasks)
        else:
            tasks = (mesh.wait(task_id, inputs.duration(timeout)),)
            output.print_json(tasks[0]) if as_json else output.print_task(tasks[0])
    _exit_with_state(tasks)


def list_tasks(
    *,
    type_name: TypeFilter = None,
    state: StateFilter = None,
    tag: TagFilter = None,
    root: Annotated[UUID | None, typer.Option(help="Only this task and everything that followed from it.")] = None,
    parent: Annotated[UUID | None, typer.Option(help="Only what this task led to.")] = None,
    after: Annotated[str | None, typer.Option(help="Only tasks created after this moment.")] = None,
    before: Annotated[str | None, typer.Option(help="Only tasks created before this moment.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List tasks, newest first."""
    wanted: Filter = {"type": type_name, "state": state, "tag": tag, "root_id": root, "parent_id": parent}
    if after is not None:
        wanted["created_after"] = inputs.moment(after)
    if before is not None:
        wanted["created_before"] = inputs.moment(before)
    with connect() as mesh:
        tasks = list(mesh.list(limit=limit, **wanted))
    output.print_json(tasks) if as_json else output.print_tasks(tasks)


def tail(
    task_id: Annotated[
        UUID | None, typer.Argument(metavar="[ID]", help="Only this task, until it is finished.")
    ] = None,
    *,
    tree: Annotated[bool, typer.Option("--tree", help="And everything that follows from the task.")] = False,
    type_name: TypeFilter = None,
    tag: TagFilter = None,
    as_json: AsJson = False,
) -> None:
    """Show changes of state as they happen: those of one task, or of all until interrupted."""
    if task_id and (type_name or tag):
        raise typer.BadParameter("--type and --tag choose among all tasks; leave out the ID")
    if tree and not task_id:
        raise typer.BadParameter("--tree needs the ID of a task")
    with connect() as mesh:
        types: dict[UUID, str] = {}
        changes = mesh.events(task_id, tree=tree) if task_id else _watch(mesh, type_name, tag, types)
        for change in changes:
            if as_json:
                output.print_json_line(change)
                continue
            if change.task_id not in types:
                types[change.task_id] = mesh.get(change.task_id).type
            output.print_change(change, types[change.task_id])


def _watch(mesh: Taskmesh, type_name: str | None, tag: str | None, types: dict[UUID, str]) -> Iterator[StateChange]:
    """The changes that show in the list of tasks, looked at once a second; a state shorter than that may be missed."""
    seen: dict[UUID, tuple[Any, ...]] = {}
    for round_number in itertools.count():
        tasks = list(mesh.list(limit=TAIL_WINDOW, page_size=TAIL_WINDOW, type=type_name, tag=tag))
        changed = [task for task in tasks if seen.get(task.id) != (task.state, task.attempt)]
        seen = {task.id: (task.state, task.attempt) for task in tasks}
        types.update((task.id, task.type) for task in tasks)
        # The first look shows where things stand, as `tail` shows the end of a file.
        newest = changed[:TAIL_START] if round_number == 0 else changed
        for task in sorted(newest, key=_changed_at):
            yield _as_change(task)
        time.sleep(TAIL_POLL_SECONDS)


def _changed_at(task: Task) -> Any:
    return task.updated_at or task.created_at


def _as_change(task: Task) -> StateChange:
    detail = task.error.model_dump() if task.error else None
    return StateChange(
        seq=0, task_id=task.id, state=task.state, attempt=task.attempt, at=_changed_at(task), detail=detail
    )


def _exit_with_state(tasks: tuple[Task, ...] | list[Task]) -> None:
    if not all(task.finished for task in tasks):
        raise typer.Exit(ExitCode.TIMEOUT)
    if not all(task.succeeded for task in tasks):
        raise typer.Exit(ExitCode.TASK_FAILED)
