"""How `taskmesh plan` shows what it found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from taskmesh.cli import output
from taskmesh.planning.demands import Demands, Part
from taskmesh.planning.limits import Limit
from taskmesh.planning.outcome import Outcome
from taskmesh.planning.scenarios import Trigger
from taskmesh.planning.sizing import Plan


def print_plan(made: Plan) -> None:
    """Pods, trigger values, shared parts and limits."""
    _print_pods(made)
    _print_scaled_object(made)
    _print_demands(made.demands, made.load.retention_days)
    _print_limits(made.limits, made.load.peak)


def print_outcome(outcome: Outcome, made: Plan, trigger: Trigger) -> None:
    """A simulated run, with its delay in red when it is longer than asked for."""
    output.show(Text(f"\nSimulated: {outcome.scenario}, {trigger}", style="bold"))
    delays = outcome.delays
    late = "bold red" if delays.p95 > made.load.delay_seconds else "green"
    delay = Text(f"p50 {_time(delays.p50)}, ") + Text(f"p95 {_time(delays.p95)}", style=late)
    delay += Text(f", p99 {_time(delays.p99)}, longest {_time(delays.longest)}")
    waiting = f"{outcome.waiting:,}, the oldest for {_time(outcome.oldest_waiting_seconds)}"
    output.print_fields(
        [
            ("tasks", f"{outcome.started:,} runs in {_time(outcome.seconds)}"),
            ("delay", delay),
            ("still waiting", waiting if outcome.waiting else None),
            ("pods", f"{outcome.fewest_replicas} to {outcome.most_replicas}"),
            ("paid", f"{outcome.pod_seconds / 3600:.1f} pod-hours, {outcome.busy_share:.0%} of their slots busy"),
            ("wasted", f"{outcome.wasted_pod_seconds / 3600:.1f} pod-hours"),
            ("interrupted", f"{outcome.handed_back} handed back, {outcome.killed} killed"),
        ]
    )


def print_warnings(warnings: Sequence[str]) -> None:
    """What the plan cannot promise."""
    for warning in warnings:
        output.show(Text(f"\n{warning}", style="yellow"), wrap=False)


def _print_pods(made: Plan) -> None:
    load, replicas, workers = made.load, made.replicas, made.workers
    waits = f"{_time(replicas.mean_wait_seconds)} on average, p95 {_time(replicas.p95_wait_seconds)}"
    waits += f", p99 {_time(replicas.p99_wait_seconds)}; {replicas.waiting_share:.0%} wait at all"
    output.print_fields(
        [
            ("load", f"{load.rate:g} tasks/s, at most {load.peak:g}; {_time(load.run_seconds)} each, cv {load.cv:g}"),
            ("asked for", f"{load.percentile:g} % start within {_time(load.delay_seconds)}"),
            ("pods", Text(f"{replicas.minimum} to {replicas.maximum}", style="bold")),
            ("  of", f"{workers.concurrency} slots, {made.demands.pod_memory_mib} MiB, pool {workers.pool}"),
            ("busy", f"{replicas.busy_slots:.1f} slots, {replicas.utilisation:.0%} of the smallest number"),
            ("wait", waits),
        ]
    )


def _print_scaled_object(made: Plan) -> None:
    triggers, replicas = made.triggers, made.replicas
    output.show(Text("\nScaledObject", style="bold"))
    output.print_fields(
        [
            ("queue", f"value {triggers.queue_value}: messages per pod, ready and unacknowledged"),
            ("work outstanding", f"value {triggers.work_seconds_value:g}: seconds per pod"),
            ("min, max", f"{replicas.minimum}, {replicas.maximum}; fallback {triggers.fallback_replicas} or more"),
            ("polling, cooldown", f"{triggers.polling_seconds} s, {triggers.cooldown_seconds} s"),
            ("scale-down window", f"{triggers.stabilization_seconds} s"),
            ("soft shutdown, grace", f"{triggers.soft_shutdown_seconds} s, {triggers.grace_seconds} s"),
            ("new pods help after", f"{triggers.reaction_seconds:g} s, at the latest"),
        ]
    )


def _print_demands(needed: Demands, retention_days: float) -> None:
    commits = f"{needed.commits_per_second:,.0f} commits/s, {needed.rows_per_second:,.0f} rows/s"
    kept = f"{needed.kept_gib:,.1f} GiB in {retention_days:g} days"
    output.show(Text("\nShared parts, at the peak", style="bold"))
    output.print_fields(
        [
            *((part.name, _part(part)) for part in needed.parts),
            ("broker", f"{needed.messages_per_second:,.1f} messages/s, {needed.broker_connections:,} connections"),
            ("database", f"{commits}, {needed.wal_mib_per_second:,.2f} MiB/s of WAL"),
            ("connections", f"{needed.service_database_connections:,} to the service's database, at most"),
            ("disk", f"{kept}; {needed.wal_gib_per_day:,.1f} GiB of WAL a day"),
            ("memory", f"{needed.workers_memory_gib:,.1f} GiB for all pods of the worker"),
        ]
    )


def _print_limits(limits: Sequence[Limit], peak: float) -> None:
    output.show(Text("\nOne of each carries", style="bold"))
    shown = output.table("TASKS/S", "WHAT", "BASIS", "THEN")
    shown.columns[0].justify = "right"
    for limit in limits:
        style = "bold red" if limit.tasks_per_second < peak else ""
        shown.add_row(Text(f"{limit.tasks_per_second:,.0f}", style=style), limit.what, limit.basis, limit.change)
    output.show(shown)


def _part(part: Part) -> str:
    text = f"{part.cpu_ms:.1f} ms a task, {part.cores:,.2f} cores"
    if part.processes is None:
        return text
    return f"{text}, {part.processes:,} process{'es' if part.processes > 1 else ''}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
