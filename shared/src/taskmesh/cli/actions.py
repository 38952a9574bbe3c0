"""`taskmesh cancel`, `retry` and `explain`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.json import JSON
from rich.text import Text

from taskmesh.cli import inputs, output
from taskmesh.cli.failures import ExitCode
from taskmesh.cli.tasks import AsJson, TaskId, connect
from taskmesh.client import Explanation, TaskState


def cancel(
    task_id: TaskId,
    *,
    reason: Annotated[str | None, typer.Option(help="Shown with the task.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Kill the process that runs it, if its type allows.")] = False,
    wait: Annotated[str | None, typer.Option(help="Wait this long for its service to say how it ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a task, wherever it is; the exit code is 1 if it had ended otherwise, or did."""
    with connect() as mesh:
        answer = mesh.cancel(task_id, reason=reason, force=force, wait=None if wait is None else inputs.duration(wait))
    if as_json:
        output.print_json(answer)
    else:
        output.print_fields(
            [
                ("task", Text(str(answer.task.id), style="bold")),
                ("type", answer.task.type),
                ("state", output.state_text(answer.task.state)),
                ("outcome", answer.outcome),
                ("", answer.detail),
            ]
        )
    if not answer.settled:
        raise typer.Exit(ExitCode.OK if wait is None else ExitCode.TIMEOUT)
    if answer.task.state is not TaskState.CANCELLED:
        raise typer.Exit(ExitCode.TASK_FAILED)


def retry(
    task_id: TaskId,
    *,
    payload: Annotated[
        str | None, typer.Option(help="Instead of its own: JSON, @file, or - for standard input.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a task again that failed, was cancelled or expired: as a new task."""
    content = None if payload is None else inputs.payload(payload, [])
    with connect() as mesh:
        task = mesh.retry(task_id, payload=content)
    output.print_json(task) if as_json else output.print_task(task.model_copy(update={"payload": None}))


def explain(task_id: TaskId, *, as_json: AsJson = False) -> None:
    """Say why a task is not done."""
    with connect() as mesh:
        answer = mesh.explain(task_id)
    output.print_json(answer) if as_json else _show(answer)


def _show(answer: Explanation) -> None:
    output.print_fields(
        [
            ("task", Text(str(answer.task_id), style="bold")),
            ("state", output.state_text(answer.state)),
            ("reason", Text(answer.reason, style="bold")),
            ("", answer.summary),
            ("next", output.moment_text(answer.next_at, datetime.now(UTC))),
            ("advice", answer.advice),
            ("facts", JSON.from_data(answer.facts) if answer.facts else None),
        ]
    )
