"""One task type: what becomes of its tasks, and how long each part takes."""

from __future__ import annotations

from typing import Final

from taskmesh_observability.panels import (
    PER_SECOND,
    SECONDS,
    SHARE,
    Query,
    Row,
    build,
    choice,
    graph,
    quantiles,
    rate,
    traces,
)

_OF: Final = 'type="$type"'
_SPANS: Final = 'span.taskmesh.task.type = "$type"'

_FATE: Final = Row(
    "What becomes of them",
    [
        graph(
            "Accepted",
            PER_SECOND,
            "By callers and schedules. Tasks that services send each other show up only in the next graph.",
            Query(rate("taskmesh_tasks_accepted_total", "", _OF), "accepted"),
        ),
        graph(
            "Steps",
            PER_SECOND,
            "What the ledger heard: a task that runs well is `queued`, sometimes `running`, and `succeeded`.",
            Query(rate("taskmesh_task_transitions_total", "state", _OF), "{{state}}"),
        ),
        graph(
            "Share of attempts that come to nothing",
            SHARE,
            "`retrying` is tried again, `failed` is over. What they fail of is in the next row and in the traces.",
            Query(
                rate("taskmesh_task_transitions_total", "state", f'state=~"retrying|failed", {_OF}')
                + " / on () group_left () "
                + rate("taskmesh_task_transitions_total", "", f'state=~"retrying|failed|succeeded", {_OF}'),
                "{{state}}",
            ),
        ),
        graph(
            "Failures by code",
            PER_SECOND,
            "For good. `taskmesh list` with this type and state `failed` names tasks; `taskmesh explain ID` says more.",
            Query(rate("taskmesh_task_transitions_total", "code", f'state="failed", {_OF}'), "{{code}}"),
            stacked=True,
        ),
        graph(
            "Repeated attempts by code",
            PER_SECOND,
            "Each is tried again after a growing pause.",
            Query(rate("taskmesh_task_transitions_total", "code", f'state="retrying", {_OF}'), "{{code}}"),
            stacked=True,
        ),
        graph(
            "Deliveries",
            PER_SECOND,
            "By what became of each; `duplicate` did nothing, because the inbox knew it.",
            Query(
                rate("messaging_process_duration_seconds_count", "taskmesh_outcome", 'taskmesh_task_type="$type"'),
                "{{taskmesh_outcome}}",
            ),
            stacked=True,
        ),
    ],
)

_TIME: Final = Row(
    "How long it takes",
    [
        graph(
            "From when it is wanted to the end",
            SECONDS,
            "Waiting, running and pauses between attempts. The points are single tasks and lead to their traces.",
            *quantiles("taskmesh_task_duration_seconds", _OF),
        ),
        graph(
            "Waiting time",
            SECONDS,
            "From due to the first start. The attempt's span has it in three parts: `taskmesh.outbox.dwell_ms`, "
            "`taskmesh.broker.dwell_ms`, `taskmesh.prefetch.dwell_ms`.",
            *quantiles("taskmesh_task_wait_duration_seconds", _OF),
        ),
        graph(
            "Run time",
            SECONDS,
            "Of one attempt, whatever became of it. Nearing the time limit: the task will be killed in mid-run.",
            *quantiles("taskmesh_task_run_duration_seconds", _OF),
        ),
    ],
)

_TRACES: Final = Row(
    "Traces",
    [
        traces(
            "Attempts that failed",
            "The newest first. Attempts of one task are siblings in its trace, or in traces that are linked.",
            f'{{ {_SPANS} && span.taskmesh.outcome =~ "failed|retrying|dead-lettered" }}',
        ),
        traces("Slow attempts", "Longer than five seconds.", f"{{ {_SPANS} && duration > 5s }}"),
        traces(
            "Waited long",
            "More than five seconds between the broker and the worker.",
            f"{{ {_SPANS} && (span.taskmesh.broker.dwell_ms > 5000 || span.taskmesh.prefetch.dwell_ms > 5000) }}",
        ),
        traces(
            "Kept although not sampled",
            "Attempts that failed or were slow in a trace that the head sampler had dropped: what is left of it is this span.",
            f"{{ {_SPANS} && span.taskmesh.sampled_late = true }}",
        ),
    ],
)

DASHBOARD: Final = build(
    "taskmesh-type",
    "Taskmesh: one task type",
    "What becomes of its tasks, and how long each part takes.",
    [_FATE, _TIME, _TRACES],
    choice("type", "Type", "label_values(taskmesh_task_transitions_total, type)", "The task type."),
)
