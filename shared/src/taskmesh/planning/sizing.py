"""What one worker service needs for its load: replicas, trigger values, and its share of broker and database."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from taskmesh.planning.autoscaling import (
    SYNC_SECONDS,
    Fallback,
    HorizontalPodAutoscaler,
    Policy,
    Rules,
    ScaledObject,
)
from taskmesh.planning.costs import measured
from taskmesh.planning.demands import Demands, demands
from taskmesh.planning.fleet import PodSpec
from taskmesh.planning.limits import COUNTED, Limit, limits
from taskmesh.planning.queueing import Station, slots_for
from taskmesh.planning.simulation import QUEUE_LIMIT
from taskmesh.settings import WorkerSettings

POLLING_SECONDS = 10
METRIC_LAG_SECONDS = 5
GRACE_MARGIN_SECONDS = 30
SCALE_UP = Rules(policies=(Policy(percent=100, period_seconds=30.0), Policy(pods=4, period_seconds=30.0)))
"""Doubled or four more within half a minute, which is about what a pod takes to start and be counted."""
SCALE_DOWN = Rules(stabilization_seconds=300.0, policies=(Policy(pods=1, period_seconds=30.0),))
"""One by one: a pod that comes back costs its start-up, one that stays costs its rent."""
AIM = 0.5
"""The triggers aim at this share of the delay: they act late, and not at all within the HPA's tolerance."""
MOST_BUSY = 0.85
"""Of the planned slots, at the planned rate: beyond it a small mistake in rate or run time is a queue without end."""
MOST_SLOTS = 1_000_000
LARGEST_CV = 2.0
CONCURRENCY: int = WorkerSettings.model_fields["worker_concurrency"].default
SOFT_SHUTDOWN_SECONDS: float = WorkerSettings.model_fields["soft_shutdown_seconds"].default
PREFETCH = 1
"""Messages that a Taskmesh worker holds for each slot: only those it runs."""
POSTGRES_CONNECTIONS = 100
"""PostgreSQL's default for `max_connections`."""
TIME_LIMIT_SECONDS = 300.0
"""The hard time limit of a task that names no other."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Pool(StrEnum):
    PREFORK = "prefork"
    THREADS = "threads"
    SOLO = "solo"


class Requirement(BaseModel):
    """What a service has to do, and how soon.

    Attributes:
        rate: Tasks that become due per second, as usual; these start in time without any scaling.
        peak: At the busiest; these are what the largest number of replicas is for.
        run_seconds: What one run takes.
        cv: The spread of that: standard deviation by mean.
        attempts: Runs that a task takes, on average.
        delay_seconds: From due to started, for `percentile` of the tasks.
        backlog: A flood that has to be worked off beside the peak ...
        drain_seconds: ... within this time.
        retention_days: How long the ledger and the inbox are kept.
    """

    model_config = ConfigDict(frozen=True)

    rate: Positive
    peak: Positive
    run_seconds: Positive
    cv: Annotated[float, Field(ge=0, le=10)] = 1.0
    attempts: Annotated[float, Field(ge=1, le=100)] = 1.0
    delay_seconds: Positive = 5.0
    percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    backlog: Annotated[int, Field(ge=0)] = 0
    drain_seconds: Positive = 3600.0
    retention_days: Positive = 90.0

    @model_validator(mode="after")
    def _peak_is_highest(self) -> Self:
        if self.peak < self.rate:
            raise ValueError("the peak must not be below the usual rate")
        if self.peak * self.attempts * self.run_seconds > MOST_SLOTS:
            raise ValueError(f"the peak keeps more than {MOST_SLOTS:,} slots busy: plan a part of it, such as a tenth")
        return self


class Workers(BaseModel):
    """How the service's worker is deployed."""

    model_config = ConfigDict(frozen=True)

    concurrency: Annotated[int, Field(ge=1, le=256)] = CONCURRENCY
    prefetch: Annotated[int, Field(ge=1, le=1000)] = PREFETCH
    pool: Pool = Pool.PREFORK
    startup_seconds: Annotated[float, Field(ge=0, le=3600)] = 20.0
    time_limit_seconds: Positive = TIME_LIMIT_SECONDS

    @model_validator(mode="after")
    def _solo_is_one(self) -> Self:
        if self.pool is Pool.SOLO and self.concurrency != 1:
            raise ValueError("the pool solo runs one task at a time: the concurrency must be 1")
        return self


class Replicas(BaseModel):
    """Figures of the queueing model, with the smallest number of replicas and at the usual rate."""

    model_config = ConfigDict(frozen=True)

    busy_slots: float
    minimum: int
    maximum: int
    utilisation: float
    waiting_share: float
    mean_wait_seconds: float
    p95_wait_seconds: float
    p99_wait_seconds: float


class Triggers(BaseModel):
    """What goes into the ScaledObject and the pod's specification."""

    model_config = ConfigDict(frozen=True)

    queue_value: int
    work_seconds_value: float
    polling_seconds: int
    cooldown_seconds: int
    stabilization_seconds: int
    fallback_replicas: int
    soft_shutdown_seconds: int
    grace_seconds: int
    reaction_seconds: float


class Plan(BaseModel):
    """Everything that follows from a load; `warnings` are sentences that say what to do."""

    model_config = ConfigDict(frozen=True)

    load: Requirement
    workers: Workers
    replicas: Replicas
    triggers: Triggers
    demands: Demands
    limits: tuple[Limit, ...]
    warnings: tuple[str, ...]


def plan(load: Requirement, workers: Workers, like: str) -> Plan:
    """Size a service whose tasks cost as much as the measured kind `like`."""
    kind = measured().kinds[like]
    replicas = _replicas(load, workers)
    triggers = _triggers(load, workers, replicas)
    needed = demands(
        kind,
        rate=load.rate,
        peak=load.peak,
        pods=replicas.maximum,
        concurrency=workers.concurrency,
        processes=workers.pool is Pool.PREFORK,
        retention_days=load.retention_days,
    )
    found = limits(kind, counted=like == COUNTED)
    return Plan(
        load=load,
        workers=workers,
        replicas=replicas,
        triggers=triggers,
        demands=needed,
        limits=found,
        warnings=tuple(_warnings(load, workers, replicas, triggers, needed)),
    )


def scaled_object(plan: Plan) -> ScaledObject:
    """The ScaledObject that the plan asks for."""
    return ScaledObject(
        minimum=plan.replicas.minimum,
        maximum=plan.replicas.maximum,
        polling_seconds=plan.triggers.polling_seconds,
        cooldown_seconds=plan.triggers.cooldown_seconds,
        fallback=Fallback(replicas=plan.triggers.fallback_replicas),
        scale_up=SCALE_UP,
        scale_down=SCALE_DOWN,
    )


def autoscaler(plan: Plan) -> HorizontalPodAutoscaler:
    """The same bounds and rules for an HPA without KEDA."""
    return HorizontalPodAutoscaler(
        plan.replicas.minimum, plan.replicas.maximum, scale_up=SCALE_UP, scale_down=SCALE_DOWN
    )


def pod_spec(plan: Plan) -> PodSpec:
    """The pods that the plan asks for."""
    return PodSpec(
        slots=plan.workers.concurrency,
        startup_seconds=plan.workers.startup_seconds,
        soft_shutdown_seconds=plan.triggers.soft_shutdown_seconds,
        grace_seconds=plan.triggers.grace_seconds,
    )


def queue_value(concurrency: int, prefetch: int, run_seconds: float, delay_seconds: float) -> int:
    """Messages per pod, ready and unacknowledged, at which tasks start after this delay on average.

    A pod holds `concurrency` messages that it runs, and works off `concurrency / run_seconds` others in a second: as
    many as that may wait, times the delay. Never less than what a pod holds, or its own work would ask for another pod.
    """
    return max(concurrency * prefetch, math.floor(concurrency * (1 + delay_seconds / run_seconds) + 1e-9))


def work_seconds_value(concurrency: int, delay_seconds: float) -> float:
    """Seconds of work that may wait for each pod: it does `concurrency` of them in a second, whatever the tasks are."""
    return concurrency * delay_seconds


def _replicas(load: Requirement, workers: Workers) -> Replicas:
    concurrency = workers.concurrency
    peak_load = load.peak * load.attempts * load.run_seconds
    draining = peak_load + load.backlog * load.attempts * load.run_seconds / load.drain_seconds
    minimum = math.ceil(_slots(load, load.rate) / concurrency)
    station = Station(load.rate * load.attempts, load.run_seconds, load.cv, minimum * concurrency)
    return Replicas(
        busy_slots=station.load,
        minimum=minimum,
        maximum=max(
            math.ceil(_slots(load, load.peak) / concurrency), math.ceil(draining / concurrency - 1e-9), minimum
        ),
        utilisation=station.utilisation,
        waiting_share=station.waiting_share,
        mean_wait_seconds=station.mean_wait,
        p95_wait_seconds=station.wait(95),
        p99_wait_seconds=station.wait(99),
    )


def _slots(load: Requirement, rate: float) -> int:
    """Slots that start tasks in time at this rate, and are not busier than they may be."""
    runs = rate * load.attempts
    in_time = slots_for(runs, load.run_seconds, load.cv, wait=load.delay_seconds, percentile=load.percentile)
    return max(in_time, math.ceil(runs * load.run_seconds / MOST_BUSY - 1e-9))


def _triggers(load: Requirement, workers: Workers, replicas: Replicas) -> Triggers:
    longest = _longest_usual_run(load, workers)
    return Triggers(
        queue_value=queue_value(workers.concurrency, workers.prefetch, load.run_seconds, AIM * load.delay_seconds),
        work_seconds_value=work_seconds_value(workers.concurrency, AIM * load.delay_seconds),
        polling_seconds=POLLING_SECONDS,
        cooldown_seconds=max(300, math.ceil(longest)),
        stabilization_seconds=max(int(SCALE_DOWN.stabilization_seconds), math.ceil(longest)),
        fallback_replicas=replicas.minimum,
        soft_shutdown_seconds=max(int(SOFT_SHUTDOWN_SECONDS), math.ceil(longest)),
        grace_seconds=math.ceil(workers.time_limit_seconds) + GRACE_MARGIN_SECONDS,
        reaction_seconds=METRIC_LAG_SECONDS + SYNC_SECONDS + workers.startup_seconds,
    )


def _longest_usual_run(load: Requirement, workers: Workers) -> float:
    """What 99 of 100 runs stay below, taken as mean and three deviations; no run is longer than its limit."""
    return min(load.run_seconds * (1 + 3 * load.cv), workers.time_limit_seconds)


def _warnings(
    load: Requirement, workers: Workers, replicas: Replicas, triggers: Triggers, needed: Demands
) -> list[str]:
    said = []
    if load.cv > LARGEST_CV:
        said.append(
            f"A cv of {load.cv:g} is beyond what the formulas are good for; simulate it, and give long tasks a service "
            "of their own."
        )
    if load.run_seconds * (1 + load.cv) > workers.time_limit_seconds:
        said.append(
            f"Many runs will reach the time limit of {workers.time_limit_seconds:g} s; raise --time-limit and the "
            "task's own, or split the task."
        )
    if workers.prefetch > PREFETCH:
        said.append(
            f"A prefetch of {workers.prefetch} is not what Taskmesh workers do: tasks wait in one pod while another "
            "is idle, which no figure here includes."
        )
    if load.peak > load.rate and triggers.reaction_seconds > load.delay_seconds:
        said.append(
            f"New pods help {triggers.reaction_seconds:g} s after the load has risen, later than the delay of "
            f"{load.delay_seconds:g} s: a rise from {load.rate:g} to {load.peak:g} tasks/s is late meanwhile. Where "
            "that matters, plan with --rate at the peak."
        )
    if needed.service_database_connections > POSTGRES_CONNECTIONS:
        said.append(
            f"{replicas.maximum} pods open up to {needed.service_database_connections} database connections; "
            f"PostgreSQL's default is {POSTGRES_CONNECTIONS}. Raise max_connections, or run fewer slots."
        )
    if load.backlog > QUEUE_LIMIT:
        said.append(
            f"A queue takes {QUEUE_LIMIT:,} messages; the rest of a backlog of {load.backlog:,} waits in the outbox, "
            "where the queue trigger does not see it. The trigger on work outstanding does."
        )
    if workers.pool is not Pool.PREFORK:
        said.append(f"The pool {workers.pool} cannot enforce time limits: every call needs a time-out of its own.")
    return said
