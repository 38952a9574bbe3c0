"""The `taskmesh` command; `taskmesh --help` lists what it can do, `taskmesh.cli.failures` its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from taskmesh.cli import actions, dead, plan, reconcile, schedules, services, tasks, types, verify
from taskmesh.cli.failures import UsageError, describe
from taskmesh.cli.output import print_error
from taskmesh.client import ClientError

app = typer.Typer(
    name="taskmesh",
    help="Submit work to the mesh and follow it. Reads TASKMESH_URL and TASKMESH_API_KEY.",
    epilog="Exit codes: 0 all is well, 1 a task did not succeed, 2 wrong usage, 3 the gateway refused, "
    "4 the gateway cannot be reached, 5 the waiting was over before the task was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(tasks.submit)
app.command()(tasks.get)
app.command()(tasks.wait)
app.command("list")(tasks.list_tasks)
app.command()(tasks.tail)
app.command()(actions.cancel)
app.command()(actions.retry)
app.command()(actions.explain)
app.command()(types.types)
app.command()(reconcile.reconcile)
app.command()(verify.verify)
app.command()(plan.plan)
app.add_typer(dead.app, name="dead")
app.add_typer(schedules.app, name="schedules")
app.add_typer(services.app, name="services")


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit code."""
    try:
        app(list(arguments), prog_name="taskmesh")
    except (ClientError, UsageError) as error:
        code, lines = describe(error)
        print_error(lines)
        return code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def main() -> None:
    """Be the `taskmesh` command."""
    sys.exit(run(sys.argv[1:]))
