"""`taskmesh schedules`: tasks that are submitted again and again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import typer
from rich.json import JSON
from rich.text import Text

from taskmesh.cli import inputs, output
from taskmesh.cli.tasks import AsJson, connect
from taskmesh.client import Schedule
from taskmesh.client.schedules import NewSchedule

app = typer.Typer(help="Tasks that are submitted again and again.", no_args_is_help=True)

ScheduleId = Annotated[UUID, typer.Argument(metavar="ID", help="The schedule's id.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Unique among all schedules.")],
    type_name: Annotated[str, typer.Argument(metavar="TYPE", help="Such as billing.invoice.issue.")],
    *,
    payload: Annotated[str | None, typer.Option(help="The payload as JSON, @file, or - for standard input.")] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="One field: buyer.name=Ada, or due_days:=30 for JSON.")
    ] = None,
    cron: Annotated[str | None, typer.Option(help="Five fields, such as '30 2 * * *'.")] = None,
    every: Annotated[str | None, typer.Option(help="Instead of --cron: 30s, 5m, 2h, 1d.")] = None,
    timezone: Annotated[str, typer.Option(help="IANA zone in which --cron is read.")] = "UTC",
    skip_overlap: Annotated[
        bool, typer.Option("--skip-overlap", help="Leave a fire out while the last run is still going.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a schedule."""
    if (cron is None) == (every is None):
        raise typer.BadParameter("give either --cron or --every")
    options: NewSchedule = {"overlap": "skip" if skip_overlap else "allow"}
    if cron is not None:
        options |= {"cron": cron, "timezone": timezone}
    if every is not None:
        options["interval_seconds"] = inputs.duration(every).total_seconds()
    with connect() as mesh:
        _show(mesh.schedules.create(name, type_name, inputs.payload(payload, fields or []), **options), as_json=as_json)


@app.command("list")
def list_schedules(*, as_json: AsJson = False) -> None:
    """List the schedules."""
    with connect() as mesh:
        schedules = list(mesh.schedules.list())
    if as_json:
        output.print_json(schedules)
        return
    now = datetime.now(UTC)
    shown = output.table("ID", "NAME", "TYPE", "FIRES", "NEXT", "LAST")
    for one in schedules:
        following = "paused" if one.paused else output.ago(one.next_fire_at, now) if one.next_fire_at else "never"
        last = output.ago(one.last_fire_at, now) if one.last_fire_at else ""
        shown.add_row(str(one.id), one.name, one.type, one.rhythm, following, last)
    output.show(shown)


@app.command()
def get(schedule_id: ScheduleId, *, as_json: AsJson = False) -> None:
    """Show a schedule."""
    with connect() as mesh:
        _show(mesh.schedules.get(schedule_id), as_json=as_json)


@app.command()
def pause(schedule_id: ScheduleId, *, as_json: AsJson = False) -> None:
    """Fire no more until resumed."""
    with connect() as mesh:
        _show(mesh.schedules.pause(schedule_id), as_json=as_json)


@app.command()
def resume(schedule_id: ScheduleId, *, as_json: AsJson = False) -> None:
    """Fire again."""
    with connect() as mesh:
        _show(mesh.schedules.resume(schedule_id), as_json=as_json)


@app.command()
def delete(schedule_id: ScheduleId) -> None:
    """Fire never again; tasks that it has submitted stay."""
    with connect() as mesh:
        mesh.schedules.delete(schedule_id)


def _show(one: Schedule, *, as_json: bool) -> None:
    if as_json:
        output.print_json(one)
        return
    now = datetime.now(UTC)
    output.print_fields(
        [
            ("schedule", Text(str(one.id), style="bold")),
            ("name", one.name),
            ("type", one.type),
            ("fires", one.rhythm),
            ("next", "paused" if one.paused else output.moment_text(one.next_fire_at, now)),
            ("then", ", ".join(f"{moment.astimezone():%Y-%m-%d %H:%M:%S %z}" for moment in one.next_fires[1:])),
            ("last", output.moment_text(one.last_fire_at, now)),
            ("last task", one.last_task_id),
            ("error", one.last_error and Text(one.last_error, style="red")),
            ("payload", JSON.from_data(one.payload) if one.payload else None),
        ]
    )
