"""`python -m taskmesh_local up|down|status|logs|demo|thousand|faults|costs|examples`: what the Makefile calls."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taskmesh.errors import TaskmeshError
from taskmesh_local import environment, logs
from taskmesh_local.folders import Folders
from taskmesh_local.mesh import Mesh, Standing
from taskmesh_local.progress import Progress
from taskmesh_local.roles import NAMES
from taskmesh_local.state import State, locked

# Imported when they are called: each brings much that `up` and `down` do without.
TOOLS = {
    "faults": "taskmesh_local.faults.command",
    "costs": "taskmesh_local.costs",
    "examples": "taskmesh_local.examples",
}
COMMANDS = "up | down | status | logs | demo | thousand | faults | costs | examples"
COLORS = {"up": "green", "not ready": "yellow", "down": "red"}


def main(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one per command
    """Run one command and return the process's exit code."""
    # Refused connections are what waiting for a server looks like; pika logs each as an error.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=False)
    folders = Folders.find()
    if words[:1] == ["demo"]:
        return _reporting(folders, console, lambda: demo(folders, console, words[1:]))
    if words[:1] == ["thousand"]:
        return _reporting(folders, console, lambda: thousand(folders, console, words[1:]))
    if words[:1] and words[0] in TOOLS:
        tool = importlib.import_module(TOOLS[words[0]])
        return _reporting(folders, console, lambda: int(tool.main(words[1:], console)))
    options = _parser().parse_args(words)
    match options.command:
        case "up":
            unknown = [name for name in options.names if name not in NAMES]
            if unknown:
                print(f"There is no process {', '.join(unknown)}. There are: {', '.join(NAMES)}.", file=sys.stderr)
                return 2
            return _reporting(folders, console, lambda: up(folders, console, options.names))
        case "down":
            return _reporting(folders, console, lambda: down(folders, console, purge=options.purge))
        case "status":
            return _reporting(folders, console, lambda: status(folders, console))
        case "logs":
            return logs.show(folders, options.names or None, follow=options.follow)
        case "inbox":
            from taskmesh_local import inbox

            return inbox.serve(folders, http_port=options.http_port, smtp_port=options.smtp_port)
        case _:
            from taskmesh_local import traces

            return traces.serve(folders, http_port=options.http_port)


def up(folders: Folders, console: Console, names: Sequence[str], *, hints: bool = True) -> int:
    """Start the mesh, or the named processes, and print where everything is, and what to try unless told not to."""
    with locked(folders) as state:
        mesh = Mesh(state, Progress(console))
        try:
            mesh.up(names or NAMES)
        finally:
            state.save()
        standings = mesh.standings()
    if names:
        return 0 if all(standing.is_up for standing in standings if standing.name in names) else 1
    console.print()
    console.print(_urls(mesh, folders))
    if not hints:
        return 0
    console.print("\nThe mesh is up. Try it in this shell:\n", highlight=False)
    for line in (
        f". {os.path.relpath(folders.env)}",
        ".venv/bin/taskmesh types",
        "make demo",
    ):
        console.print(f"  [bold]{escape(line)}[/bold]", highlight=False, soft_wrap=True)
    console.print()
    return 0


def down(folders: Folders, console: Console, *, purge: bool) -> int:
    """Stop the mesh."""
    if not folders.state.exists():
        console.print("Nothing is running: this mesh has not been started yet.", highlight=False)
        return 0
    with locked(folders) as state:
        Mesh(state, Progress(console)).down(purge=purge)
        given = bool(state.given)
    if purge:
        for path in folders.root.iterdir():
            # `make` keeps its own tools there; they are no data of the mesh.
            if path.name == "tools":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    gone = "and its data is deleted" + (", but for what is on the given servers" if given else "")
    kept = gone if purge else "and its data is kept; `make up` starts it again"
    console.print(f"The mesh is down, {kept}.", highlight=False)
    return 0


def status(folders: Folders, console: Console) -> int:
    """Print how every process is; the exit code is 0 when all of them are up."""
    if not folders.state.exists():
        console.print("The mesh has not been started yet; `make up` starts it.", highlight=False)
        return 1
    standings = Mesh(State.load(folders), Progress(console)).standings()
    table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0))
    for title, justify in (
        ("process", "left"),
        ("pid", "right"),
        ("state", "left"),
        ("up for", "right"),
        ("url", "left"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type] # rich's literals
    for standing in standings:
        color = COLORS[standing.state]
        pid = str(standing.process.pid) if standing.process else ""
        table.add_row(standing.name, pid, f"[{color}]{standing.state}[/{color}]", _uptime(standing), standing.url)
    console.print(table)
    missing = [standing.name for standing in standings if not standing.is_up]
    if missing:
        what = ", ".join(missing) if len(missing) < len(standings) else "all of them"
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        line = f"\n{len(missing)} of {len(standings)} {verb} not up: {what}. `make up` starts {them}."
        console.print(line, highlight=False, soft_wrap=True)
        return 1
    console.print(f"\nAll {len(standings)} are up.", highlight=False)
    return 0


def demo(folders: Folders, console: Console, words: Sequence[str]) -> int:
    """Start the mesh unless all of it is up, then run the demo; the mesh stays up."""
    _bring_up(folders, console)
    from taskmesh_local.demo import main as run

    return run(list(words)) or 0


def thousand(folders: Folders, console: Console, words: Sequence[str]) -> int:
    """Start the mesh unless all of it is up, then send a thousand requests and check their traces."""
    _bring_up(folders, console)
    from taskmesh_local.thousand import main as run

    return run(list(words), console)


def _bring_up(folders: Folders, console: Console) -> None:
    is_up = folders.state.exists() and all(s.is_up for s in Mesh(State.load(folders), Progress(console)).standings())
    if not is_up:
        up(folders, console, [], hints=False)
        console.print()
    os.environ.update(environment.read(folders.env))


def _reporting(folders: Folders, console: Console, command: Callable[[], int]) -> int:
    """Run a command; what goes wrong on this machine is told in words, not in a traceback."""
    try:
        return command()
    except TaskmeshError as error:
        return _complain(str(error))
    except OSError as error:
        if error.filename is None:
            return _complain(str(error))
        place = f"The mesh keeps what it has in {folders.root}; TASKMESH_LOCAL_FOLDER names another folder."
        return _complain(f"{error.filename}: {error.strerror}. {place}")
    except KeyboardInterrupt:
        console.print("\nInterrupted. What was started stays; `make down` stops it.", highlight=False)
        return 130


def _complain(text: str) -> int:
    Console(stderr=True).print(f"[red]✗[/red] {escape(text)}", highlight=False, soft_wrap=True)
    return 1


def _urls(mesh: Mesh, folders: Folders) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    api = mesh.url("gateway-api")
    for title, url in (
        ("API", api),
        ("API documentation", f"{api}/docs"),
        ("Inbox: mails the mesh has sent", mesh.url("inbox")),
        ("Traces: one per request", mesh.url("traces")),
        ("RabbitMQ management", mesh.management_url()),
        ("", f"its user and password are in {os.path.relpath(folders.env)}"),
    ):
        table.add_row(title, url)
    return table


def _uptime(standing: Standing) -> str:
    seconds = standing.process.uptime_seconds() if standing.process else None
    return str(timedelta(seconds=int(seconds))) if seconds is not None else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taskmesh-local", description="The whole mesh on one machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=COMMANDS)
    start = commands.add_parser("up", help="start what does not run")
    start.add_argument("names", nargs="*", metavar="name", help="only these: " + ", ".join(NAMES))
    stop = commands.add_parser("down", help="stop everything, keep the data")
    stop.add_argument("--purge", action="store_true", help="delete the data, too")
    commands.add_parser("status", help="show how every process is")
    show = commands.add_parser("logs", help="print the end of the logs")
    show.add_argument("names", nargs="*", metavar="name", help="only these: " + ", ".join(NAMES))
    show.add_argument("-f", "--follow", action="store_true", help="go on printing until interrupted")
    commands.add_parser("demo", help="send 30 invoices through the mesh")
    commands.add_parser("thousand", help="send 1,000 requests, and check that each has left one whole trace")
    commands.add_parser("faults", help="harm a mesh of its own under load, and check what must hold")
    commands.add_parser("costs", help="measure what a task costs each part of the mesh that is up")
    commands.add_parser("examples", help="run the examples of a page, and write their output anew")
    for page in ("inbox", "traces"):
        serve = commands.add_parser(page)
        serve.add_argument("--http-port", type=int, required=True)
        if page == "inbox":
            serve.add_argument("--smtp-port", type=int, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
