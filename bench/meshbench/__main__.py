"""`python -m meshbench`: the benchmark; docs/performance.md says what its cases mean."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from meshbench import machine, report, results
from meshbench.cases import backlog, drain, footprint, hops, latency, reading, submit, waiting
from meshbench.contest import Measured
from meshbench.ground import standing
from meshbench.results import Result
from meshbench.stage import Sizes, Stage

CASES: Mapping[str, Callable[[Stage], list[Measured]]] = {
    "submit": submit.submit,
    "drain": drain.drain,
    "latency": latency.latency,
    "batch": submit.submit_batch,
    "relay": hops.relay,
    "projector": hops.projector,
    "footprint": footprint.footprint,
    "waiting": waiting.waiting,
    "reading": reading.reading,
    "backlog": backlog.backlog,
}
"""By the name that `--only` takes, in the order in which they run."""

QUICK = ("submit", "drain", "latency")
"""What a quick run has the time for."""


def main() -> int:
    """Run the cases, print what they have come to, and write it down."""
    options = _parser().parse_args()
    # By itself the signal would leave servers and roles running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    quick = Sizes(rounds=1, seconds=1.0, tasks=500, rows=20_000, waiting=5_000, listeners=100, quick=True)
    usual = quick if options.quick else Sizes()
    sizes = Sizes(
        rounds=options.rounds or usual.rounds,
        seconds=options.seconds or usual.seconds,
        tasks=options.tasks or usual.tasks,
        rows=options.rows or usual.rows,
        waiting=options.waiting or usual.waiting,
        listeners=usual.listeners,
        quick=options.quick,
    )
    folder = options.results or (results.QUICK_FOLDER if options.quick else results.FOLDER)
    names = options.only or (QUICK if options.quick else tuple(CASES))
    with standing() as ground:
        about = machine.describe(ground) | {"rounds": sizes.rounds, "quick": sizes.quick}
        with contextlib.closing(Stage(ground, sizes)) as stage:
            for place, (name, run) in enumerate(CASES.items()):
                if name in names:
                    # Written case by case: whatever comes later, this is measured.
                    results.write(
                        [
                            Result(measured, about | {"place": 10 * place + number})
                            for number, measured in enumerate(_told(name, run, stage))
                        ],
                        folder,
                    )
    if options.publish:
        results.publish(results.read(folder))
    print(f"\nwritten to {folder}")
    return 0


def _told(name: str, run: Callable[[Stage], list[Measured]], stage: Stage) -> list[Measured]:
    print(f"\n{name}", flush=True)
    begun = time.monotonic()
    made = run(stage)
    for measured in made:
        print(f"\n{report.text(measured)}")
    print(f"({time.monotonic() - begun:.0f} s)", flush=True)
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshbench", description="Measure Taskmesh against what its users would take instead."
    )
    parser.add_argument("--only", action="append", choices=tuple(CASES), help="this case; may be given several times")
    parser.add_argument("--rounds", type=int, help="turns of each contestant that count")
    parser.add_argument("--seconds", type=float, help="of a turn that is timed")
    parser.add_argument("--tasks", type=int, help="of a turn that works something off")
    parser.add_argument("--rows", type=int, help="in the large ledger, for example 5000000")
    parser.add_argument("--waiting", type=int, help="tasks in the backlog, for example 1000000")
    parser.add_argument("--quick", action="store_true", help="90 seconds: the first cases, one short round")
    parser.add_argument("--results", type=Path, help="where JSON and pictures go")
    parser.add_argument("--publish", action="store_true", help="write all results into docs/performance.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
