"""One service: its tasks, its workers, its queues and its outbox."""

from __future__ import annotations

from typing import Final

from taskmesh_observability.panels import (
    COUNT,
    PER_SECOND,
    SECONDS,
    SHARE,
    TYPE,
    Query,
    Row,
    build,
    choice,
    graph,
    number,
    quantile,
    rate,
    traces,
)

_OF: Final = 'service="$service"'
_JOB: Final = 'job=~"$service(-worker)?"'
_QUEUES: Final = 'queue=~"$service([.].+)?"'

_NOW: Final = Row(
    "Now",
    [
        number(
            "Oldest task that waits",
            SECONDS,
            "How long the oldest task has been due without a start. `taskmesh list` finds it, `taskmesh explain ID` says why.",
            Query(f"max(taskmesh_service_oldest_task_age_seconds{{{_OF}}})"),
            red_from=120,
        ),
        number(
            "Until the backlog is done",
            SECONDS,
            "Work outstanding, divided by the slots of all workers. Longer than callers can wait: add workers.",
            Query(
                f"max by (service) (taskmesh_service_work_outstanding_seconds{{{_OF}}}) / on (service) taskmesh:worker:slots"
            ),
            red_from=600,
        ),
        number(
            "Busy slots",
            SHARE,
            "Share of the workers' slots that run a task. No figure: no worker reports.",
            Query(f"max(taskmesh:worker:busy_ratio{{{_OF}}})"),
        ),
        number(
            "Open dead letters",
            COUNT,
            "`taskmesh dead groups` says what they died of. Mend the cause, then replay.",
            Query(f"max(taskmesh_dead_letters_open{{{_OF}}})"),
            red_from=1,
        ),
        number(
            "Budget of late tasks left",
            SHARE,
            "Of the last 30 days. Below 0: the objective is broken; what is late is in the traces below.",
            Query(
                f'1 - sum_over_time(taskmesh:objective:bad{{objective="finished", {_OF}}}[30d]) '
                f'/ sum_over_time(taskmesh:objective:all{{objective="finished", {_OF}}}[30d]) '
                "/ on (objective) group_left () taskmesh:objective:budget_ratio"
            ),
            red_below=0,
        ),
        number(
            "Target",
            SECONDS,
            "From when it is wanted to the end; changed in `prometheus/rules/objectives.yml`.",
            Query(f"max(taskmesh:objective:target_seconds{{{_OF}}})"),
        ),
    ],
)

_TASKS: Final = Row(
    "Tasks",
    [
        graph(
            "Started and ended",
            PER_SECOND,
            "What the ledger heard. Much `queued` and little else: nobody takes the tasks.",
            Query(rate("taskmesh_task_transitions_total", "state", _OF), "{{state}}"),
        ),
        graph(
            "From when it is wanted to the end, 95 %",
            SECONDS,
            "By type. A click leads to the type.",
            Query(quantile(0.95, "taskmesh_task_duration_seconds", "type", _OF), "{{type}}", exemplars=True),
            links=[TYPE],
        ),
        graph(
            "Waiting time, 95 %",
            SECONDS,
            "From due to the first start. Rising for all types at once: too few workers, or they are paused or wait for "
            "their database.",
            Query(quantile(0.95, "taskmesh_task_wait_duration_seconds", "type", _OF), "{{type}}", exemplars=True),
            links=[TYPE],
        ),
        graph(
            "Run time, 95 %",
            SECONDS,
            "Of one attempt. Rising for one type: what it calls is slow, or its payloads have grown.",
            Query(quantile(0.95, "taskmesh_task_run_duration_seconds", "type", _OF), "{{type}}", exemplars=True),
            links=[TYPE],
        ),
        graph(
            "Failures",
            PER_SECOND,
            "Tasks that failed for good, by type and code. The codes are explained in the runbook under *Dead letters*.",
            Query(rate("taskmesh_task_transitions_total", "type, code", f'state="failed", {_OF}'), "{{type}} {{code}}"),
            stacked=True,
            links=[TYPE],
        ),
        graph(
            "Repeated attempts",
            PER_SECOND,
            "Attempts that failed and will be repeated, by type and code.",
            Query(
                rate("taskmesh_task_transitions_total", "type, code", f'state="retrying", {_OF}'), "{{type}} {{code}}"
            ),
            stacked=True,
            links=[TYPE],
        ),
    ],
)

_TRAFFIC: Final = Row(
    "Workers, queues and outbox",
    [
        graph(
            "Slots",
            COUNT,
            "Tasks that run, and that could run, over all workers.",
            Query(f"sum(taskmesh_worker_in_flight{{{_JOB}}})", "busy"),
            Query(f"sum(taskmesh_worker_slots{{{_JOB}}})", "slots"),
        ),
        graph(
            "Messages",
            COUNT,
            "In the service's queues. `unacknowledged` without any task running: a worker holds them and hangs.",
            Query(f"max by (queue, state) (taskmesh_queue_messages{{{_QUEUES}}})", "{{queue}} {{state}}"),
        ),
        graph(
            "Consumers",
            COUNT,
            "Workers take from the service's queue and its events, relays from its control queue.",
            Query(f"max by (queue) (taskmesh_queue_consumers{{{_QUEUES}}})", "{{queue}}"),
        ),
        graph(
            "Deliveries",
            PER_SECOND,
            "What became of each. `duplicate` is the inbox at work and harmless; many of them: connections are being lost.",
            Query(rate("messaging_process_duration_seconds_count", "taskmesh_outcome", _JOB), "{{taskmesh_outcome}}"),
            stacked=True,
        ),
        graph(
            "Outbox",
            SECONDS,
            "Age of the oldest due row, and how long messages waited until the broker had them. High lag: the relay is "
            "down. High dwell: it does not keep up, or the broker is slow.",
            Query(f"max(taskmesh_outbox_lag_seconds{{{_JOB}}})", "oldest row"),
            Query(quantile(0.95, "taskmesh_outbox_dwell_seconds", "", _JOB), "dwell, 95 %", exemplars=True),
        ),
        graph(
            "Published",
            PER_SECOND,
            "By what the broker said. `returned`: no queue takes it. `refused`: no right, or a queue is full. `unknown`: "
            "the answer was lost, and it is published again.",
            Query(rate("taskmesh_messages_published_total", "exchange, outcome", _JOB), "{{exchange}} {{outcome}}"),
        ),
    ],
)

_OWN: Final = Row(
    "What only some services have",
    [
        graph(
            "Mail relay",
            PER_SECOND,
            "email: what mail relays said. `4xx` is tried again for 72 hours; `5xx` in `session` or `mail`: they refuse us.",
            Query(
                rate("taskmesh_smtp_replies_total", "reply_class, stage, outcome", _JOB),
                "{{reply_class}} {{stage}} {{outcome}}",
            ),
        ),
        graph(
            "Invoices",
            PER_SECOND,
            "billing: issued and committed, by currency.",
            Query(rate("taskmesh_billing_invoices_total", "currency", _JOB), "{{currency}}"),
            stacked=True,
        ),
    ],
)

_TRACES: Final = Row(
    "Traces",
    [
        traces(
            "Attempts that failed",
            "A click opens the trace: what called it, how long it waited, what it called. `taskmesh.retry.reason` names "
            "the failure before.",
            '{ resource.service.name =~ "$service(-worker)?" && span.taskmesh.outcome =~ "failed|retrying|dead-lettered" }',
        ),
        traces(
            "Slow attempts",
            "Longer than five seconds. The spans below the attempt show where the time went.",
            '{ resource.service.name =~ "$service(-worker)?" && span.messaging.operation.name = "process" && duration > 5s }',
        ),
    ],
)

DASHBOARD: Final = build(
    "taskmesh-service",
    "Taskmesh: one service",
    "Its tasks, its workers, its queues and its outbox.",
    [_NOW, _TASKS, _TRAFFIC, _OWN, _TRACES],
    choice(
        "service",
        "Service",
        "label_values(taskmesh_dead_letters_open, service)",
        "The first word of its task types; its processes are called like it, or with -worker behind.",
    ),
)
