"""Are the promises kept: the objectives, the account of all tasks, and the ways in which messages go astray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from taskmesh_observability.panels import (
    COUNT,
    PER_SECOND,
    SECONDS,
    SERVICE,
    SHARE,
    Panel,
    Query,
    Row,
    build,
    graph,
    number,
    quantile,
    rate,
    words,
)


def _burn(objective: str, title: str, description: str, legend: str) -> Panel:
    lines = [
        Query(f'taskmesh:objective:burn_{window}{{objective="{objective}"}}', f"{legend}{window}")
        for window in ("1h", "6h", "3d")
    ]
    return graph(title, COUNT, description, *lines, line_at=1)


def _left(objective: str, title: str, description: str) -> Panel:
    bad, all_ = (f'taskmesh:objective:{which}{{objective="{objective}"}}[30d]' for which in ("bad", "all"))
    spent = (
        f"sum_over_time({bad}) / sum_over_time({all_}) / on (objective) group_left () taskmesh:objective:budget_ratio"
    )
    return number(title, SHARE, description, Query(f"min(1 - {spent})"), red_below=0)


_BUDGETS: Final[Sequence[Panel]] = [
    words(
        "Three objectives, over 30 days: 99 % of each service's tasks end **within its target**; 99.5 % of the time **every "
        "task is accounted for**; 99 % of the time **no dead letter is older than a day**. What is left of the rest is the "
        "budget. A burn rate of 1 spends exactly all of it; alerts fire at 14.4 and 6 (page), 3 and 1 (ticket)."
    ),
    _left(
        "finished",
        "Budget: on time",
        "Of the service that has least left. Below 0: stop what makes it worse, such as releases and big imports.",
    ),
    _left(
        "unaccounted",
        "Budget: accounted for",
        "Below 0: tasks are lost again and again. Find what takes messages out of the mesh before anything else.",
    ),
    _left(
        "dead_letters",
        "Budget: dead letters",
        "Of the service that has least left. Below 0: nobody looks after them; `taskmesh dead groups`.",
    ),
    number(
        "Unaccounted tasks",
        COUNT,
        "At the last audit. `taskmesh reconcile` names them. No figure: nobody audits.",
        Query("max(taskmesh_unaccounted_tasks)"),
        red_from=1,
    ),
    number(
        "Oldest dead letter",
        SECONDS,
        "Open ones only; none is best.",
        Query("max(taskmesh_dead_letters_oldest_age_seconds)"),
        red_from=86400,
    ),
    number(
        "Open dead letters",
        COUNT,
        "They wait for a person. Nothing is lost by waiting but time.",
        Query("sum(max by (service) (taskmesh_dead_letters_open))"),
        red_from=1,
    ),
    _burn(
        "finished",
        "Burn: on time",
        "How many times too fast each service spends its budget. The runbook's page is *TaskmeshTasksFinishLate*.",
        "{{service}} ",
    ),
    _burn(
        "unaccounted",
        "Burn: accounted for",
        "The runbook's page is *TaskmeshTasksUnaccounted*.",
        "",
    ),
    _burn(
        "dead_letters",
        "Burn: dead letters",
        "The runbook's page is *TaskmeshDeadLettersOld*.",
        "{{service}} ",
    ),
]

_ACCOUNT: Final = Row(
    "Where all tasks are",
    [
        graph(
            "Tasks by place",
            COUNT,
            "Accepted = waiting + running + finished + dead + unaccounted, at each audit. Waiting grows: see the mesh.",
            Query('max by (place) (taskmesh_tasks{place!="accepted"})', "{{place}}"),
            stacked=True,
        ),
        graph(
            "Unaccounted",
            COUNT,
            "A step that is gone at the next audits was mended by sending the message again.",
            Query("max(taskmesh_unaccounted_tasks)", "unaccounted"),
            line_at=1,
        ),
        graph(
            "Lag of the ledger",
            SECONDS,
            "Until the ledger knows what has happened. It lags behind the truth, it never contradicts it.",
            Query(quantile(0.5, "taskmesh_projector_lag_seconds"), "50 %"),
            Query(quantile(0.99, "taskmesh_projector_lag_seconds"), "99 %", exemplars=True),
            line_at=60,
        ),
    ],
)

_ASTRAY: Final = Row(
    "Messages that went astray",
    [
        graph(
            "Dead letters, open",
            COUNT,
            "By service. First mend the cause, then `taskmesh dead replay --group ...`.",
            Query("max by (service) (taskmesh_dead_letters_open)", "{{service}}"),
            links=[SERVICE],
        ),
        graph(
            "Dead letters, arriving",
            PER_SECOND,
            "By code. `poison` kills its workers: look at memory and time limits. `unknown_task` or "
            "`contract_violation`: a worker is older than its callers.",
            Query(rate("taskmesh_dead_letters_stored_total", "service, code"), "{{service}} {{code}}"),
            stacked=True,
            links=[SERVICE],
        ),
        graph(
            "Delivered again",
            PER_SECOND,
            "Deliveries that the inbox knew: each would have been a second effect. Many: workers or connections die.",
            Query(rate("messaging_process_duration_seconds_count", "job", 'taskmesh_outcome="duplicate"'), "{{job}}"),
        ),
        graph(
            "Not taken by the broker",
            PER_SECOND,
            "`returned` and `refused` rows stay in the outbox and say why; `unknown` ones are published again.",
            Query(
                rate("taskmesh_messages_published_total", "job, outcome", 'outcome!="confirmed"'), "{{job}} {{outcome}}"
            ),
        ),
        graph(
            "Time in the outbox, 99 %",
            SECONDS,
            "From due to the broker's answer. It is the price of never losing a message: milliseconds.",
            Query(quantile(0.99, "taskmesh_outbox_dwell_seconds", "job"), "{{job}}", exemplars=True),
        ),
        graph(
            "Schedules",
            SECONDS,
            "How late they fire, 99 %. Up to 5 s is on time. More: the scheduler is down, or its database slow; "
            "`last_error` in the table `schedules` says why a single one is put off.",
            Query(quantile(0.99, "taskmesh_schedule_lateness_seconds"), "lateness"),
            line_at=60,
        ),
        graph(
            "Fires",
            PER_SECOND,
            "`skipped` ones were missed by too much, or the one before still ran; `schedule_fires` has the reason of each.",
            Query(rate("taskmesh_schedule_fires_total", "outcome"), "{{outcome}}"),
        ),
        graph(
            "Telemetry that was lost",
            PER_SECOND,
            "Where this is not 0, the other figures have holes. The work is not touched.",
            Query(
                rate("taskmesh_telemetry_dropped_total", "job, taskmesh_role, signal"),
                "{{job}} {{taskmesh_role}} {{signal}}",
            ),
        ),
    ],
)

DASHBOARD: Final = build(
    "taskmesh-guarantees",
    "Taskmesh: delivery guarantees",
    "Are the promises kept: the objectives, the account of all tasks, and the ways in which messages go astray.",
    [Row("Objectives", _BUDGETS), _ACCOUNT, _ASTRAY],
)
