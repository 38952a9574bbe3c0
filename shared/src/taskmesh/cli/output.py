"""What the command shows: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.json import JSON
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from taskmesh.client import StateChange, Task, TaskState

STATE_STYLES = {
    TaskState.SCHEDULED: "blue",
    TaskState.QUEUED: "cyan",
    TaskState.RUNNING: "yellow",
    TaskState.RETRYING: "magenta",
    TaskState.SUCCEEDED: "green",
    TaskState.FAILED: "bold red",
    TaskState.CANCELLED: "dim",
    TaskState.EXPIRED: "red",
}
# A pipe has no width: nothing is cut off there.
PIPE_WIDTH = 1000
# What a terminal would obey, as signs that show it: names, errors and bodies are written by strangers.
VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


class _Harmless:
    """Content without the control characters that it holds."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(segment.text.translate(VISIBLE), segment.style)


def show(content: RenderableType, *, wrap: bool = True) -> None:
    """Print to standard output; into a pipe without colour, cutting or padding."""
    content = _Harmless(content)
    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(content, soft_wrap=not wrap)
        return
    out = Console(width=PIPE_WIDTH, color_system=None, highlight=False, markup=False)
    with out.capture() as capture:
        out.print(content, soft_wrap=not wrap)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)  # noqa: T201 - this is the output


def print_error(lines: Sequence[str]) -> None:
    """Errors, on standard error."""
    out = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    out.print(_Harmless(Text("taskmesh: ", style="bold red") + Text(lines[0])))
    for line in lines[1:]:
        out.print(_Harmless(Text(line)))


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """One JSON document."""
    content = (
        value.model_dump(mode="json") if isinstance(value, BaseModel) else [v.model_dump(mode="json") for v in value]
    )
    print(json.dumps(content, ensure_ascii=False, indent=2))  # noqa: T201 - this is the output


def print_json_line(value: BaseModel) -> None:
    """One line of a stream of JSON, at once."""
    print(value.model_dump_json(), flush=True)  # noqa: T201 - this is the output


def table(*columns: str) -> Table:
    """An empty table in the command's style; the first column is never cut."""
    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, no_wrap=True, overflow="fold" if index == 0 else "ellipsis")
    return made


def state_text(state: TaskState) -> Text:
    """A state in its colour."""
    return Text(state.value, style=STATE_STYLES[state])


def print_tasks(tasks: Iterable[Task]) -> None:
    """Tasks as a table."""
    now = datetime.now(UTC)
    shown = table("ID", "TYPE", "STATE", "CREATED", "TOOK", "TAGS")
    for task in tasks:
        created = ago(task.created_at, now)
        if task.state is TaskState.SCHEDULED and task.due_at:
            created = f"due {ago(task.due_at, now)}"
        took = length(task.finished_at - _begin(task)) if task.finished_at else ""
        shown.add_row(str(task.id), task.type, state_text(task.state), created, took, " ".join(task.tags))
    show(shown)


def print_tree(tasks: Sequence[Task]) -> None:
    """The tasks of one request, each under the one that led to it."""
    now = datetime.now(UTC)
    shown = table("TASK", "STATE", "TOOK", "ID")
    known = {task.id for task in tasks}

    def add(task: Task, depth: int) -> None:
        took = length((task.finished_at or now) - _begin(task))
        shown.add_row("  " * depth + task.type, state_text(task.state), took, str(task.id))
        for child in tasks:
            if child.parent_id == task.id and child.id != task.id:
                add(child, depth + 1)

    for task in tasks:
        if task.parent_id not in known:
            add(task, 0)
    show(shown)


def print_task(task: Task) -> None:
    """Everything about one task."""
    now = datetime.now(UTC)
    rows: list[tuple[str, Any]] = [
        ("task", Text(str(task.id), style="bold")),
        ("type", task.type),
        ("state", state_text(task.state)),
        ("attempt", str(task.attempt) if task.attempt > 1 else None),
        ("parent", task.parent_id),
        ("tags", " ".join(task.tags)),
        ("priority", task.priority),
        *((name, moment_text(getattr(task, f"{name}_at"), now)) for name in ("created", "due", "expires", "started")),
        ("finished", moment_text(task.finished_at, now)),
        ("took", length(task.finished_at - _begin(task)) if task.finished_at else None),
        ("retry of", task.retry_of),
        ("retried as", task.retried_as),
        ("cancel asked", moment_text(task.cancel_requested_at, now)),
        ("because", task.cancel_reason),
        ("trace", task.trace_id),
    ]
    if task.error:
        kind = f" ({task.error.exception})" if task.error.exception else ""
        rows.append(("error", Text(f"{task.error.code}: {task.error.message}{kind}", style="red")))
    rows += [(name, JSON.from_data(value)) for name in ("payload", "result") if (value := getattr(task, name))]
    print_fields(rows)


def print_fields(rows: Iterable[tuple[str, Any]]) -> None:
    """Names and values; those without a value are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, ""):
            grid.add_row(name, value if isinstance(value, Text | JSON) else str(value))
    show(grid)


def print_change(change: StateChange, type_name: str) -> None:
    """One change of state as one line."""
    line = Text(change.at.astimezone().strftime("%H:%M:%S.%f")[:-3], style="dim")
    line += Text("  ") + Text(f"{change.state.value:<9}", style=STATE_STYLES[change.state])
    line += Text(f"  {change.task_id}  {type_name}")
    if change.attempt > 1:
        line += Text(f"  attempt {change.attempt}", style="magenta")
    if isinstance(change.detail, dict) and (message := change.detail.get("message")):
        line += Text(f"  {message}", style="red")
    show(line, wrap=False)


def ago(moment: datetime, now: datetime) -> str:
    """How long before or after now: `3 s ago`, `in 2 h`; the date when it is over a month."""
    away = (now - moment).total_seconds()
    if abs(away) > 30 * 86_400:
        return moment.astimezone().strftime("%Y-%m-%d")
    if abs(away) < 1:
        return "now"
    return f"{_round(away)} ago" if away > 0 else f"in {_round(-away)}"


def _begin(task: Task) -> datetime:
    """When the task came to be: one that a service started may reach the ledger after it has begun."""
    known = (task.created_at, task.queued_at, task.started_at)
    return min(moment for moment in known if moment)


def length(span: Any) -> str:
    """A length of time, to about two figures."""
    seconds = max(span.total_seconds(), 0.0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else _round(seconds)


def _round(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def moment_text(moment: datetime | None, now: datetime) -> Text | None:
    if moment is None:
        return None
    return Text(f"{moment.astimezone():%Y-%m-%d %H:%M:%S %z}  ") + Text(ago(moment, now), style="dim")
