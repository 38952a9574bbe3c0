"""The whole mesh: is it well, what does it do, and where does work wait."""

from __future__ import annotations

from typing import Final

from taskmesh_observability.panels import (
    COUNT,
    PER_SECOND,
    SECONDS,
    SERVICE,
    SHARE,
    Query,
    Row,
    build,
    graph,
    listing,
    number,
    quantile,
    quantiles,
    rate,
    words,
)

_WELL: Final = Row(
    "Is it well?",
    [
        words(
            "From left to right: **nothing lost**, **nothing stuck**, **nothing forgotten**. A red figure has an alert of "
            "its own, and the alert has a page in `docs/runbook.md`. A click on a line below leads to its service or type."
        ),
        number(
            "Unaccounted tasks",
            COUNT,
            "Accepted tasks that are in no outbox, no queue and no worker's hands. Anything but 0 for minutes: "
            "`taskmesh reconcile`, and the runbook's *TaskmeshTasksUnaccounted*. No figure: nobody audits.",
            Query("max(taskmesh_unaccounted_tasks)"),
            red_from=1,
        ),
        number(
            "Broker",
            "bool_on_off",
            "Whether the reconciler reaches RabbitMQ. Off: tasks are accepted, and wait in the outboxes.",
            Query("max(taskmesh_broker_reachable)"),
            red_below=1,
        ),
        number(
            "Oldest row of an outbox",
            SECONDS,
            "How long the oldest due message has waited to leave its service. Growing: that relay is down or cannot "
            "reach the broker; see its log for `relay interrupted`.",
            Query("max(taskmesh_outbox_lag_seconds)"),
            red_from=60,
        ),
        number(
            "Oldest task that waits",
            SECONDS,
            "How long the oldest task has been due without a start, over all services. Growing: look at its service below.",
            Query("max(taskmesh_service_oldest_task_age_seconds)"),
            red_from=120,
        ),
        number(
            "Open dead letters",
            COUNT,
            "Messages that could not be run and wait for a person: `taskmesh dead groups`.",
            Query("sum(max by (service) (taskmesh_dead_letters_open))"),
            red_from=1,
        ),
        number(
            "Requests answered with 5xx",
            SHARE,
            "Share of the gateway's answers. Its database is away, or the gateway is broken: `GET /readyz` tells them apart.",
            Query(
                'sum(rate(http_server_request_duration_seconds_count{job="gateway", http_response_status_code=~"5.."}'
                "[$__rate_interval])) "
                '/ sum(rate(http_server_request_duration_seconds_count{job="gateway"}[$__rate_interval]))'
            ),
            red_from=0.05,
        ),
        listing(
            "Alerts that fire",
            "Each has a page of its own name in `docs/runbook.md`.",
            Query('ALERTS{alertname=~"Taskmesh.+", alertstate="firing"}'),
        ),
        listing(
            "Processes",
            "How many there are of each role and release. A role that is missing is named by *TaskmeshRoleGone*.",
            Query("count by (job, taskmesh_role, version) (taskmesh_build_info)"),
        ),
    ],
)

_WORK: Final = Row(
    "Work",
    [
        graph(
            "Accepted",
            PER_SECOND,
            "Tasks that callers and schedules have submitted, by service. Follow-up tasks of services are not among them.",
            Query(rate("taskmesh_tasks_accepted_total", "service"), "{{service}}"),
            stacked=True,
            links=[SERVICE],
        ),
        graph(
            "Ended",
            PER_SECOND,
            "Tasks that reached a final state. Many `failed`: which type, says its service's dashboard.",
            Query(
                rate("taskmesh_task_transitions_total", "state", 'state=~"succeeded|failed|cancelled|expired"'),
                "{{state}}",
            ),
            stacked=True,
        ),
        graph(
            "From when it is wanted to the end",
            SECONDS,
            "All services together. The points are single tasks and lead to their traces. Rising while *run time* does "
            "not: tasks wait, see the next row.",
            *quantiles("taskmesh_task_duration_seconds"),
        ),
        graph(
            "Waiting time, 95 %",
            SECONDS,
            "From when a task was due to its first start. Rising: too few workers, or they wait for something.",
            Query(quantile(0.95, "taskmesh_task_wait_duration_seconds", "service"), "{{service}}"),
            links=[SERVICE],
        ),
        graph(
            "Run time, 95 %",
            SECONDS,
            "From the start of an attempt to its end. Rising: what the tasks call has become slow; a trace shows which call.",
            Query(quantile(0.95, "taskmesh_task_run_duration_seconds", "service"), "{{service}}"),
            links=[SERVICE],
        ),
        graph(
            "Repeated attempts",
            PER_SECOND,
            "Attempts that failed and will be repeated, by type. Many: what the task calls is away, or the task is wrong.",
            Query(rate("taskmesh_task_transitions_total", "type", 'state="retrying"'), "{{type}}"),
        ),
    ],
)

_WAITING: Final = Row(
    "Where work waits",
    [
        graph(
            "Outboxes",
            SECONDS,
            "Age of the oldest due row of each service. One service: its relay. All of them: the broker.",
            Query("max by (job) (taskmesh_outbox_lag_seconds)", "{{job}}"),
            line_at=60,
        ),
        graph(
            "Queues",
            COUNT,
            "Messages that are ready to be taken. Growing in a service's queue: its workers. In `gateway.lifecycle`: the "
            "projector, and the ledger is late while the work is not.",
            Query('max by (queue) (taskmesh_queue_messages{state="ready"})', "{{queue}}"),
        ),
        graph(
            "Consumers",
            COUNT,
            "Who takes from each queue. None, and messages wait: the service is down, paused, or waits for its database.",
            Query("max by (queue) (taskmesh_queue_consumers)", "{{queue}}"),
        ),
        graph(
            "Oldest task that is due",
            SECONDS,
            "And has not started, wherever it is. `taskmesh explain ID` says why one does not.",
            Query("max by (service) (taskmesh_service_oldest_task_age_seconds)", "{{service}}"),
            links=[SERVICE],
        ),
        graph(
            "Work outstanding",
            SECONDS,
            "Run time of all that waits or is due within a minute. Divided by the workers' slots, it is the time until "
            "they are through: what to scale by.",
            Query("max by (service) (taskmesh_service_work_outstanding_seconds)", "{{service}}"),
            links=[SERVICE],
        ),
        graph(
            "Busy slots",
            SHARE,
            "Share of the workers' slots that run a task. Near 1 with work outstanding: add workers.",
            Query("taskmesh:worker:busy_ratio", "{{service}}"),
            links=[SERVICE],
        ),
    ],
)

_GATEWAY: Final = Row(
    "Gateway",
    [
        graph(
            "Requests",
            PER_SECOND,
            "By status. 4xx are the callers' mistakes; 429 and 503 ask them to wait; other 5xx are ours.",
            Query(
                rate("http_server_request_duration_seconds_count", "http_response_status_code", 'job="gateway"'),
                "{{http_response_status_code}}",
            ),
            stacked=True,
        ),
        graph(
            "Time to answer",
            SECONDS,
            "Of `POST /v1/tasks`. The points lead to traces; `ledger transaction` is the part that the database takes, and the wait for a turn. "
            "Answers that wait for a task (`Prefer: wait`) are among them.",
            *quantiles("http_server_request_duration_seconds", 'job="gateway", http_route="/v1/tasks"'),
        ),
        graph(
            "Lag of the ledger, 95 %",
            SECONDS,
            "From when something happened until the ledger says so. Rising: the projector is down, or its database slow.",
            Query(quantile(0.95, "taskmesh_projector_lag_seconds"), "lag"),
            line_at=60,
        ),
    ],
)

DASHBOARD: Final = build(
    "taskmesh-mesh",
    "Taskmesh: the mesh",
    "Is it well, what does it do, and where does work wait.",
    [_WELL, _WORK, _WAITING, _GATEWAY],
)
