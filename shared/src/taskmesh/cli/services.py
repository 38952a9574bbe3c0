"""`taskmesh services`: the worker services, and whether they take tasks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer

from taskmesh.cli import output
from taskmesh.cli.tasks import AsJson, connect
from taskmesh.client import Service

app = typer.Typer(help="Worker services, and whether they take tasks.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="SERVICE", help="Such as billing.")]


@app.command("list")
def list_services(*, as_json: AsJson = False) -> None:
    """List the services that have announced themselves."""
    with connect() as mesh:
        services = mesh.services()
    output.print_json(services) if as_json else _show(services)


@app.command()
def pause(
    name: Name,
    *,
    reason: Annotated[str | None, typer.Option(help="Shown with every task that waits for it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have its workers take no more tasks; what runs is finished."""
    with connect() as mesh:
        service = mesh.pause_service(name, reason=reason)
    output.print_json(service) if as_json else _show([service])


@app.command()
def resume(name: Name, *, as_json: AsJson = False) -> None:
    """Have its workers take tasks again."""
    with connect() as mesh:
        service = mesh.resume_service(name)
    output.print_json(service) if as_json else _show([service])


def _show(services: Sequence[Service]) -> None:
    now = datetime.now(UTC)
    shown = output.table("SERVICE", "RELEASE", "TYPES", "HEARD OF", "READY", "HELD", "CONSUMERS", "PAUSED")
    for one in services:
        figures = ("ready", "unacknowledged", "consumers")
        counts = [str(sum(getattr(queue, name) for queue in one.queues)) if one.queues else "?" for name in figures]
        why = f": {one.pause_reason}" if one.pause_reason else ""
        paused = f"{output.ago(one.paused_at, now)}{why}" if one.paused_at else ""
        shown.add_row(one.service, one.release, str(one.types), output.ago(one.announced_at, now), *counts, paused)
    output.show(shown)
