"""`taskmesh verify`: which tasks of a worker service are not idempotent."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from taskmesh.cli import inputs, output
from taskmesh.cli.failures import UsageError
from taskmesh.cli.tasks import AsJson
from taskmesh.errors import TaskmeshError

if TYPE_CHECKING:
    from taskmesh.verify.plan import Plan
    from taskmesh.verify.report import Report, TypeReport, Verdict

NEEDED = "`taskmesh verify` needs more than the client: install taskmesh[worker,client,testing]"
INTERRUPTED = 130
TERMINATED = 143
STYLES = {"ok": "green", "differs": "bold red", "not_exercised": "yellow"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which then is what Ctrl-C is to whoever waits: psycopg cancels its query, the sandbox cleans up."""


def _terminate(*_: object) -> None:
    raise Terminated


def verify(
    *,
    service: Annotated[str, typer.Option(help="The service: the first word of its types.")],
    package: Annotated[str | None, typer.Option(help="What `python -m` runs; default: SERVICE_worker.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Tell the service this; KEY alone takes it from here."),
    ] = None,
    env_file: Annotated[list[Path] | None, typer.Option(help="The same, from a file of KEY=VALUE lines.")] = None,
    payload: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE=FILE", help="The payload of a type; others are made from their schema."),
    ] = None,
    prepare: Annotated[
        list[str] | None, typer.Option(help="A command that fills the sandbox with what the tasks need.")
    ] = None,
    probe: Annotated[list[str] | None, typer.Option(help="A command whose output is compared as an effect.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="TYPE", help="Verify this type alone.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="TYPE", help="Leave this type out.")] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="EFFECT[.COLUMN]", help="Do not compare it: orders, orders.touched_at, mails."),
    ] = None,
    timeout: Annotated[str, typer.Option(help="How long a delivery may take, retries included.")] = "60s",
    as_json: AsJson = False,
) -> None:
    """Deliver each task of a service twice, in a sandbox, and tell which of them do their work twice.

    Starts a private PostgreSQL and RabbitMQ, and never talks to a mesh. Exit codes: 0 every type is idempotent,
    1 one is not, 2 one could not be exercised.
    """
    try:
        from taskmesh.verify.deliveries import verify as carry_out
        from taskmesh.verify.plan import PlanMistake
    except ImportError as missing:
        raise UsageError(f"{NEEDED} ({missing.name} is missing)") from missing
    signal.signal(signal.SIGTERM, _terminate)
    try:
        plan = _plan(
            service,
            package or f"{service.replace('-', '_')}_worker",
            env=env or [],
            env_files=env_file or [],
            payloads=payload or [],
            prepare=prepare or [],
            probes=probe or [],
            only=only or [],
            skip=skip or [],
            ignore=ignore or [],
            timeout=timeout,
        )
        report = carry_out(plan, _say)
    except (PlanMistake, TaskmeshError) as error:
        raise UsageError(str(error)) from error
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        output.print_json(report)
    else:
        _print(report)
    raise typer.Exit(report.exit_code)


def _plan(
    service: str,
    package: str,
    *,
    env: list[str],
    env_files: list[Path],
    payloads: list[str],
    prepare: list[str],
    probes: list[str],
    only: list[str],
    skip: list[str],
    ignore: list[str],
    timeout: str,
) -> Plan:
    """What the command line and the package's own `verify` folder say together; the command line wins."""
    from taskmesh.verify import plan

    folder = plan.folder_of(package)
    environment = plan.folder_environment(folder)
    for path in env_files:
        environment |= plan.read_environment(path)
    return plan.Plan(
        service=service,
        package=package,
        environment=environment | plan.variables(env),
        payloads=plan.folder_payloads(folder) | plan.payload_files(payloads),
        only=frozenset(only),
        skip=frozenset(skip),
        ignore=frozenset(name for entry in ignore for name in (entry, f"table {entry}")),
        probes=tuple(probes),
        prepare=(*plan.folder_prepare(folder), *prepare),
        timeout_seconds=inputs.duration(timeout).total_seconds(),
    )


def _say(text: str) -> None:
    print(f"verify: {text}", file=sys.stderr, flush=True)  # noqa: T201 - for whoever waits


def _print(report: Report) -> None:
    from taskmesh.verify.report import Way

    shown = output.table("TYPE", "PAYLOAD", "AGAIN", "KILLED", "AT ONCE")
    for each in report.types:
        shown.add_row(each.type, each.payload, *(_verdict(each.finding(way).verdict) for way in Way))
    output.show(shown)
    for each in report.types:
        _print_details(each)
    if report.skipped:
        output.show(Text(f"\nskipped: {', '.join(report.skipped)}", style="dim"))


def _print_details(each: TypeReport) -> None:
    from taskmesh.verify.report import Verdict

    output.show(Text(f"\n{each.type}", style="bold"))
    if each.verdict is not Verdict.NOT_EXERCISED:
        output.show(Text(f"  one delivery: {', '.join(each.effects) or 'no effect seen'}"))
    told: dict[tuple[Verdict, tuple[str, ...]], list[str]] = {}
    for finding in each.findings:
        if finding.details:
            told.setdefault((finding.verdict, finding.details), []).append(finding.way.value.replace("_", " "))
    for (verdict, details), ways in told.items():
        output.show(Text(f"  {', '.join(ways)}: ") + _verdict(verdict) + Text(f": {'; '.join(details)}"))
    if each.not_compared:
        output.show(Text(f"  varies by itself, not compared: {', '.join(each.not_compared)}", style="dim"))


def _verdict(verdict: Verdict) -> Text:
    return Text(verdict.value.replace("_", " "), style=STYLES[verdict.value])
