"""`taskmesh reconcile`: is every task that was ever accepted accounted for?"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from taskmesh.cli import inputs, output
from taskmesh.cli.failures import ExitCode
from taskmesh.cli.tasks import AsJson, connect
from taskmesh.client import Taskmesh
from taskmesh.client.reconciliation import Audit, Reconciliation, UnaccountedTask

PAUSE_SECONDS = 5.0

REASONS = {
    "broker_unreachable": "the broker cannot be reached",
    "service_silent": "their service does not answer",
    "queue_not_observed": "their queue has not been seen yet",
}


def reconcile(
    *,
    run: Annotated[bool, typer.Option("--run", help="Audit now, instead of showing the last audit.")] = False,
    wait: Annotated[
        str | None, typer.Option(help="Audit again and again, this long at most, until nothing is in doubt: 90s, 5m.")
    ] = None,
    grace: Annotated[
        str | None, typer.Option(help="Examine tasks without news for this long: 0s for all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Account for every task; the exit code is 1 unless all are accounted for."""
    if grace is not None and not run and wait is None:
        raise typer.BadParameter("--grace needs --run or --wait")
    young = None if grace is None else inputs.duration(grace)
    with connect() as mesh:
        if wait is not None:
            found = _until_settled(mesh, inputs.duration(wait).total_seconds(), young)
        else:
            found = mesh.reconcile(grace=young) if run else mesh.reconciliation()
    output.print_json(found) if as_json else _print(found)
    if found.audit is None or found.audit.unaccounted:
        raise typer.Exit(ExitCode.TASK_FAILED)


def _until_settled(mesh: Taskmesh, seconds: float, grace: timedelta | None) -> Reconciliation:
    deadline = time.monotonic() + seconds
    while True:
        found = mesh.reconcile(grace=grace)
        settled = found.audit is not None and found.audit.settled
        if settled or time.monotonic() + PAUSE_SECONDS > deadline:
            return found
        # A verdict takes two audits with fresh figures of the queues in between.
        time.sleep(PAUSE_SECONDS)


def _print(found: Reconciliation) -> None:
    audit = found.audit
    if audit is None:
        output.show(Text("No audit yet. Does the gateway's role `reconciler` run?", style="red"))
        return
    now = datetime.now(UTC)
    shown = output.table("TASKS", "COUNT", "")
    shown.columns[1].justify = "right"
    shown.add_row(Text("accepted", style="bold"), str(audit.accepted), f"audited {output.ago(audit.finished_at, now)}")
    for name, note in _places(audit):
        style = "bold red" if name == "unaccounted" and audit.unaccounted else ""
        shown.add_row(Text(f"  {name}", style=style), Text(str(getattr(audit, name)), style=style), note)
    parts: list[Text] = [Text(line) for line in _remarks(audit)]
    output.show(Group(shown, *([Text("")] if parts else []), *parts))
    if found.unaccounted:
        output.show(Text(""))
        _print_unaccounted(found.unaccounted, now)


def _places(audit: Audit) -> list[tuple[str, str]]:
    dead = "with an open dead letter: `taskmesh dead list`" if audit.dead else ""
    return [("waiting", ""), ("running", ""), ("finished", ""), ("dead", dead), ("unaccounted", "")]


def _remarks(audit: Audit) -> list[str]:
    lines = [f"{count} could not be judged: {REASONS.get(why, why)}." for why, count in audit.unknown.items()]
    if audit.suspected:
        lines.append(f"{audit.suspected} suspected: the next audit tells.")
    lines += [
        f"{gap.missing} missing from queue {gap.queue}: {gap.messages} messages for {gap.presumed} tasks."
        for gap in audit.gaps
        if gap.missing
    ]
    if audit.mended:
        lines.append(f"{audit.mended} had ended, and the report was lost: mended.")
    if audit.redriven:
        lines.append(f"{audit.redriven} sent again.")
    if not audit.complete:
        lines.append("There were too many silent tasks for one audit: the next one goes on.")
    return lines


def _print_unaccounted(tasks: tuple[UnaccountedTask, ...], now: datetime) -> None:
    shown = output.table("UNACCOUNTED", "TYPE", "MISSED", "SENT AGAIN", "LAST SEEN")
    for task in tasks:
        seen = f"{output.ago(task.last_seen_at, now)}, " if task.last_seen_at else ""
        shown.add_row(
            str(task.task_id),
            task.type,
            output.ago(task.since, now) if task.since else "",
            f"{task.redrives} times" if task.redrives else "never",
            seen + (task.last_seen_where or ""),
        )
    output.show(shown)
