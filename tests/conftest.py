"""The fixtures that several areas of the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from running_orders import Orders, orders_service


@pytest.fixture(scope="module")
def orders(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """One running service for the whole module: a test that stops a process starts it again."""
    with orders_service(postgres, rabbitmq, tmp_path_factory.mktemp("orders")) as service:
        yield service
