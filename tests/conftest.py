"""The fixtures that several areas of the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from running_orders import Orders, orders_service

LONGEST_FIRST = (
    "shared/test_probes.py",
    "shared/test_attempts.py",
    "shared/test_verify.py",
    "flows/test_outages.py",
    "telemetry/test_canaries.py",
    "gateway/test_reconciler_role.py",
    "guarantees/test_worker_loss.py",
    "shared/test_cancel.py",
    "guarantees/test_shutdowns.py",
    "shared/test_worker.py",
    "local/test_mesh.py",
    "flows/test_third_worker.py",
    "telemetry/test_outage.py",
    "guarantees/test_broker_loss.py",
    "guarantees/test_cancelled.py",
    "guarantees/test_database_loss.py",
    "flows/test_invoice.py",
)
"""Files that take most of a minute or more. Each is one process's: one that began last would be waited for alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the order within a file stays."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    if gone := [str(path) for path in places if not path.exists()]:
        raise pytest.UsageError(f"LONGEST_FIRST names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module")
def orders(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """One running service for the whole module: a test that stops a process starts it again."""
    with orders_service(postgres, rabbitmq, tmp_path_factory.mktemp("orders")) as service:
        yield service
