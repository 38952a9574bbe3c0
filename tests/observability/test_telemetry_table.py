"""The table of metrics is read as Prometheus will name them."""

from __future__ import annotations

import pytest

from taskmesh_observability.telemetry_table import TARGET_LABELS, series

PAGE = """# Telemetry

## Metrics

| metric | instrument | unit | attributes | role | meaning |
|---|---|---|---|---|---|
| `taskmesh.tasks.accepted` | counter | `{task}` | `type`, `service` | `api` | tasks |
| `taskmesh.outbox.dwell` | histogram | `s` | `exchange` | `relay` | a wait |
| `taskmesh.broker.reachable` | gauge | `1` | | `reconciler` | 1 or 0 |
| `taskmesh.outbox.lag` | gauge | `s` | | `relay` | an age |

## Logs

| level | message |
|---|---|
"""


def test_names_and_labels_are_those_of_prometheus():
    assert series(PAGE) == {
        "taskmesh_tasks_accepted_total": TARGET_LABELS | {"type", "service"},
        "taskmesh_outbox_dwell_seconds_bucket": TARGET_LABELS | {"exchange", "le"},
        "taskmesh_outbox_dwell_seconds_sum": TARGET_LABELS | {"exchange"},
        "taskmesh_outbox_dwell_seconds_count": TARGET_LABELS | {"exchange"},
        "taskmesh_broker_reachable": TARGET_LABELS,
        "taskmesh_outbox_lag_seconds": TARGET_LABELS,
    }


def test_a_page_without_the_table_is_refused():
    """Without names to hold it against, every query would be wrong, or none."""
    with pytest.raises(ValueError, match="no table of metrics"):
        series("# Telemetry\n\n## Metrics\n\nNone.\n")
