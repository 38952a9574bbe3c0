"""Loads to simulate a plan with, and what happens to the mesh in each."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path

from taskmesh.errors import TaskmeshError
from taskmesh.planning import load as loads
from taskmesh.planning.load import Load, Window
from taskmesh.planning.outcome import Outcome
from taskmesh.planning.simulation import CpuScaler, KedaScaler, Scaler, simulate
from taskmesh.planning.sizing import Plan, autoscaler, pod_spec, scaled_object

MINUTE = 60.0
HOUR = 3600.0
FLOOD = 1_000_000
GATEWAY_PER_SECOND = 3_250.0
"""Tasks that the prototype of the gateway accepted: group-committed, on two cores for the whole mesh."""
MOST_TASKS = 5_000_000
CPU_TARGET = 0.7


class Scenario(StrEnum):
    STEADY = "steady"
    WAVE = "wave"
    FLOOD = "flood"
    OUTAGE = "outage"
    SLOW = "slow"
    BATCH = "batch"


class Trigger(StrEnum):
    """What the autoscaler looks at."""

    BOTH = "both"
    QUEUE = "queue"
    WORK = "work"
    CPU = "cpu"


class TooManyTasks(TaskmeshError):
    """A simulation would take minutes."""


def load_of(plan: Plan, scenario: Scenario) -> Load:
    """The load of a scenario, at the rates that the plan was made for."""
    attempts, run_seconds, cv = plan.load.attempts, plan.load.run_seconds, plan.load.cv
    rate = plan.load.rate * attempts
    steady = loads.constant(rate)
    match scenario:
        case Scenario.STEADY:
            return Load(scenario, HOUR, steady, run_seconds, cv)
        case Scenario.WAVE:
            day = loads.wave(rate, plan.load.peak * attempts, 24 * HOUR)
            return Load(scenario, 24 * HOUR, day, run_seconds, cv)
        case Scenario.FLOOD:
            return _flood(plan, rate)
        case Scenario.OUTAGE:
            return Load(scenario, HOUR, steady, run_seconds, cv, outage=Window(20 * MINUTE, 25 * MINUTE))
        case Scenario.SLOW:
            slow = Window(20 * MINUTE, 60 * MINUTE)
            return Load(scenario, 1.5 * HOUR, steady, run_seconds, cv, slow=slow, slowness=4.0, failing=0.1)
        case Scenario.BATCH:
            at_once = ((30 * MINUTE, math.ceil(10 * MINUTE * rate)),)
            return Load(scenario, HOUR, steady, run_seconds, cv, known_ahead=at_once)


def recorded(plan: Plan, path: Path) -> Load:
    """The load that a file has recorded.

    Raises:
        BadRecording: It cannot be used.
    """
    seconds, rate = loads.read_recording(path)
    return Load(path.stem, seconds, lambda at: rate(at) * plan.load.attempts, plan.load.run_seconds, plan.load.cv)


def scaler_of(plan: Plan, trigger: Trigger) -> Scaler:
    """The autoscaler that the plan asks for, with one of its triggers or both; or an HPA on CPU in its place."""
    if trigger is Trigger.CPU:
        return CpuScaler(autoscaler(plan), target=CPU_TARGET, pod=pod_spec(plan))
    return KedaScaler(
        scaled_object(plan),
        queue_value=None if trigger is Trigger.WORK else plan.triggers.queue_value,
        work_value=None if trigger is Trigger.QUEUE else plan.triggers.work_seconds_value,
    )


def run(plan: Plan, load: Load, trigger: Trigger, *, seed: int = 1) -> Outcome:
    """Simulate a load with what the plan deploys, from the replicas that its first second needs.

    Raises:
        TooManyTasks: It would take minutes.
    """
    expected = load.expected_tasks()
    if expected > MOST_TASKS:
        raise TooManyTasks(
            f"{load.name} has {expected:,.0f} tasks, and {MOST_TASKS:,} can be simulated. "
            "Divide --rate, --peak and --backlog by the same number: the replicas shrink with them"
        )
    needed = math.ceil(load.rate(0.0) * load.run_seconds / plan.workers.concurrency)
    replicas = min(max(needed, plan.replicas.minimum), plan.replicas.maximum)
    return simulate(load, pod_spec(plan), scaler_of(plan, trigger), replicas=replicas, seed=seed)


def _flood(plan: Plan, rate: float) -> Load:
    count = plan.load.backlog or FLOOD
    spare = plan.replicas.maximum * plan.workers.concurrency / plan.load.run_seconds - rate
    drained = count / spare if spare > 0 else 0.0
    seconds = 5 * MINUTE + max(drained * 1.1, count / GATEWAY_PER_SECOND) + 15 * MINUTE
    flood = loads.flood(rate, count, 5 * MINUTE, GATEWAY_PER_SECOND)
    return Load(Scenario.FLOOD, math.ceil(seconds), flood, plan.load.run_seconds, plan.load.cv)
