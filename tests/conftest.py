"""The fixtures that several areas of the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from running_orders import Orders, orders_service

HERE = Path(__file__).parent

LONGEST_FIRST = (
    (
        "guarantees/test_worker_loss.py",
        "guarantees/test_shutdowns.py",
        "guarantees/test_cancelled.py",
        "guarantees/test_relay_loss.py",
        "guarantees/test_projector_loss.py",
        "guarantees/test_bad_messages.py",
    ),
    ("shared/test_attempts.py",),
    ("flows/test_outages.py", "flows/test_third_worker.py", "flows/test_whole_traces.py", "flows/test_invoice.py"),
    ("shared/test_verify.py",),
    ("gateway/test_reconciler_role.py",),
    ("telemetry/test_span_trees.py", "telemetry/test_pictures.py"),
    ("shared/test_probes.py",),
    ("guarantees/test_broker_loss.py",),
    ("shared/test_worker.py",),
    ("telemetry/test_canaries.py",),
    ("shared/test_cancel.py",),
    ("telemetry/test_outage.py",),
    ("local/test_mesh.py",),
    ("guarantees/test_database_loss.py",),
    ("telemetry/test_exporting.py",),
    ("shared/test_parts.py",),
)
"""Files that take most of a minute or more. Each is one process's: one that began last would be waited for alone.

Files in one group share processes that take long to start: they, too, are run by one process, one after the other.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the order within a file stays."""
    places = {HERE / name: place for place, name in enumerate(name for group in LONGEST_FIRST for name in group)}
    if gone := [str(path) for path in places if not path.exists()]:
        raise pytest.UsageError(f"LONGEST_FIRST names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, as `--dist loadfile` does, and each group of files, too."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    groups = {f"{HERE.name}/{name}": group[0] for group in LONGEST_FIRST for name in group}

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return groups.get(file, file)

    return LoadGroups(config, log)


@pytest.fixture(scope="module")
def orders(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """One running service for the whole module: a test that stops a process starts it again."""
    with orders_service(postgres, rabbitmq, tmp_path_factory.mktemp("orders")) as service:
        yield service
