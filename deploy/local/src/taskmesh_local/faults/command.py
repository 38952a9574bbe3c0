"""`python -m taskmesh_local faults`: run a campaign, or show what it would do."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from taskmesh_local.faults.campaign import run
from taskmesh_local.faults.options import RATE, Options
from taskmesh_local.faults.planted import Bug
from taskmesh_local.faults.report import Report
from taskmesh_local.faults.schedule import tally


def main(arguments: Sequence[str], console: Console) -> int:
    """Run one campaign; the exit code is 0 when every invariant holds."""
    given = _parser().parse_args(arguments)
    options = Options(
        seed=given.seed,
        minutes=given.minutes,
        rate=given.rate,
        count=given.faults,
        plant=given.plant and Bug(given.plant),
        keep=given.keep,
        workers=dict(given.worker),
    )
    if given.dry_run:
        faults = options.faults()
        for fault in faults:
            console.print(str(fault), highlight=False, markup=False, soft_wrap=True)
        console.print(", ".join(f"{count} {kind}" for kind, count in tally(faults).items()), highlight=False)
        return 0
    folder = Path(tempfile.mkdtemp(prefix=f"taskmesh-faults-{options.seed}-"))
    # The servers run as another account.
    folder.chmod(0o755)
    try:
        report = asyncio.run(_until_terminated(run(options, folder / "mesh", console)))
    except asyncio.CancelledError:
        console.print(f"Ended before its time. Logs and data: {folder}", highlight=False, soft_wrap=True)
        return 130
    report.show(console)
    if given.report:
        report.write(given.report)
    if report.holds and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"Logs and data: {folder}", highlight=False, markup=False, soft_wrap=True)
    return 0 if report.holds else 1


async def _until_terminated(campaign: Coroutine[Any, Any, Report]) -> Report:
    """Run a campaign; SIGTERM ends it as Ctrl-C does, with everything stopped that it has started."""
    task = asyncio.ensure_future(campaign)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taskmesh-local faults", description="Harm a mesh under load, and check it.")
    parser.add_argument("--seed", type=int, default=1, help="decides faults and load")
    parser.add_argument("--minutes", type=float, default=4.0, help="how long load and faults go on")
    parser.add_argument("--rate", type=float, default=RATE, help="orders a second")
    parser.add_argument("--faults", type=int, help="how many; twelve a minute otherwise")
    parser.add_argument("--plant", choices=list(Bug), help="run the roles with this bug, which has to be found")
    parser.add_argument("--report", type=Path, help="write what was found as JSON to this file")
    parser.add_argument(
        "--worker",
        metavar="SERVICE=PACKAGE",
        type=_worker,
        action="append",
        default=[],
        help="a worker of your own to be harmed as well; its tasks are submitted with their schemas' examples",
    )
    parser.add_argument("--keep", action="store_true", help="keep the mesh's folder although all is well")
    parser.add_argument("--dry-run", action="store_true", help="print the schedule of faults and stop")
    return parser


def _worker(text: str) -> tuple[str, str]:
    service, equals, package = text.partition("=")
    if not (service and equals and package):
        raise argparse.ArgumentTypeError("is a service and its package, such as orders=orders_worker")
    return service, package
