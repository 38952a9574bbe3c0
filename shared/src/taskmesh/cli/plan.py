"""`taskmesh plan`: how many pods a load needs, and what KEDA makes of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ValidationError

from taskmesh.cli import inputs, output, planned
from taskmesh.cli.failures import UsageError
from taskmesh.cli.tasks import AsJson
from taskmesh.errors import TaskmeshError
from taskmesh.planning import load as loads
from taskmesh.planning import plot as pictures
from taskmesh.planning import scenarios, sizing
from taskmesh.planning.outcome import Outcome
from taskmesh.planning.scenarios import Scenario, Trigger
from taskmesh.planning.sizing import Plan, Pool

OPTIONS = {
    "rate": "--rate",
    "peak": "--peak",
    "run_seconds": "--run",
    "cv": "--cv",
    "attempts": "--attempts",
    "delay_seconds": "--delay",
    "percentile": "--percentile",
    "backlog": "--backlog",
    "drain_seconds": "--drain",
    "retention_days": "--retention",
    "concurrency": "--concurrency",
    "prefetch": "--prefetch",
    "startup_seconds": "--startup",
    "time_limit_seconds": "--time-limit",
}


class Like(StrEnum):
    """Tasks whose costs were measured."""

    MAIL = "mail"
    MAIL_IN_BATCHES = "mail_in_batches"
    INVOICE = "invoice"


class Answer(BaseModel):
    """What `--json` prints."""

    plan: Plan
    simulation: Outcome | None


def plan(
    *,
    run: Annotated[str, typer.Option(help="How long one run of a task takes: 200ms, 3s.")],
    rate: Annotated[float | None, typer.Option(help="Tasks that become due per second, as usual.")] = None,
    peak: Annotated[float | None, typer.Option(help="The same at the busiest; default: as usual.")] = None,
    cv: Annotated[
        float, typer.Option(help="Spread of the run time, deviation by mean: 0 always the same, 1 exponential.")
    ] = 1.0,
    attempts: Annotated[float, typer.Option(help="Runs that a task takes, on average, retries included.")] = 1.0,
    delay: Annotated[str, typer.Option(help="How late tasks may start.")] = "5s",
    percentile: Annotated[float, typer.Option(help="Of this percentage of tasks the delay is asked.")] = 95.0,
    concurrency: Annotated[
        int, typer.Option(help="Tasks that a pod runs at a time: TASKMESH_WORKER_CONCURRENCY.")
    ] = sizing.CONCURRENCY,
    prefetch: Annotated[
        int, typer.Option(help="Messages that a pod holds for each of them; a Taskmesh worker holds one.")
    ] = sizing.PREFETCH,
    pool: Annotated[Pool, typer.Option(help="TASKMESH_WORKER_POOL.")] = Pool.PREFORK,
    startup: Annotated[str, typer.Option(help="From a pod's creation to its first task.")] = "20s",
    time_limit: Annotated[str, typer.Option(help="The longest that a run may take.")] = "300s",
    backlog: Annotated[int, typer.Option(help="A flood of so many tasks has to be worked off beside the peak ...")] = 0,
    drain: Annotated[str, typer.Option(help="... within this time.")] = "1h",
    retention: Annotated[str, typer.Option(help="How long ledger and inbox are kept.")] = "90d",
    like: Annotated[Like, typer.Option(help="The measured task that these cost as much as.")] = Like.MAIL,
    simulate: Annotated[
        str | None,
        typer.Option(metavar="SCENARIO|FILE.csv", help=f"Simulate it: {', '.join(Scenario)}, or a recorded load."),
    ] = None,
    trigger: Annotated[
        Trigger, typer.Option(help="What the simulated autoscaler looks at; cpu is an HPA without KEDA.")
    ] = Trigger.BOTH,
    seed: Annotated[int, typer.Option(help="Another one gives another simulation of the same load.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the simulation into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many pods a service needs, which values its triggers get, and what breaks first.

    Talks to no mesh. The sums are in docs/scaling.md.
    """
    if plot is not None and simulate is None:
        raise UsageError(f"--plot draws a simulation: add --simulate {Scenario.FLOOD}")
    if simulate is not None and prefetch != sizing.PREFETCH:
        raise UsageError(
            "--simulate knows Taskmesh's workers, which hold one message for each slot: leave --prefetch out"
        )
    recording = _recording(simulate)
    usual, busiest = _rates(rate, peak, recording)
    try:
        load = sizing.Requirement(
            rate=usual,
            peak=busiest,
            run_seconds=_seconds(run),
            cv=cv,
            attempts=attempts,
            delay_seconds=_seconds(delay),
            percentile=percentile,
            backlog=backlog,
            drain_seconds=_seconds(drain),
            retention_days=_seconds(retention) / 86_400,
        )
        workers = sizing.Workers(
            concurrency=concurrency,
            prefetch=prefetch,
            pool=pool,
            startup_seconds=_seconds(startup),
            time_limit_seconds=_seconds(time_limit),
        )
    except ValidationError as error:
        raise UsageError(_mistakes(error)) from None
    made = sizing.plan(load, workers, like)
    outcome = None if simulate is None else _simulate(made, recording or Scenario(simulate), trigger, seed, plot)
    if as_json:
        output.print_json(Answer(plan=made, simulation=outcome))
        return
    planned.print_plan(made)
    if outcome is not None:
        planned.print_outcome(outcome, made, trigger)
    planned.print_warnings(made.warnings)


def _simulate(made: Plan, what: Path | Scenario, trigger: Trigger, seed: int, plot: Path | None) -> Outcome:
    try:
        load = scenarios.load_of(made, what) if isinstance(what, Scenario) else scenarios.recorded(made, what)
        outcome = scenarios.run(made, load, trigger, seed=seed)
    except TaskmeshError as error:
        raise UsageError(str(error)) from error
    if plot is not None:
        subtitle = f"{trigger} trigger{'s' if trigger is Trigger.BOTH else ''}, {made.workers.concurrency} slots a pod"
        picture = pictures.draw(outcome, load, delay_seconds=made.load.delay_seconds, subtitle=subtitle)
        try:
            plot.write_text(picture, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{plot} cannot be written: {error.strerror}") from error
    return outcome


def _recording(simulate: str | None) -> Path | None:
    if simulate is None or simulate in list(Scenario):
        return None
    path = Path(simulate)
    if path.suffix != ".csv":
        raise UsageError(f"there is no scenario {simulate!r}; there are {', '.join(Scenario)}, and files *.csv")
    return path


def _rates(rate: float | None, peak: float | None, recording: Path | None) -> tuple[float, float]:
    """What is given; a recording tells the rest."""
    if recording is not None and (rate is None or peak is None):
        try:
            seconds, recorded = loads.read_recording(recording)
        except loads.BadRecording as error:
            raise UsageError(str(error)) from error
        rates = [recorded(second) for second in range(int(seconds))]
        rate = sum(rates) / len(rates) if rate is None else rate
        peak = max(*rates, rate) if peak is None else peak
    if rate is None:
        raise UsageError("say how many tasks become due per second: --rate 20, or --simulate a recorded load")
    return rate, rate if peak is None else peak


def _seconds(text: str) -> float:
    return inputs.duration(text).total_seconds()


def _mistakes(error: ValidationError) -> str:
    return "; ".join(
        f"{OPTIONS[str(each['loc'][0])]}: {each['msg'].lower()}"
        if each["loc"]
        else each["msg"].removeprefix("Value error, ")
        for each in error.errors()
    )
