"""The pictures of docs/telemetry.md, of traces that a real mesh has just left.

`TASKMESH_PICTURES=1 pytest tests/telemetry/test_pictures.py` makes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from browsing import WIDTH, chromium, picture_file, png_size, take_picture, trace_page
from taskmesh.testing.waiting import eventually

from .conftest import Traced

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MAX_BYTES = 150_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(
    ("name", "payload", "spans"),
    [
        ("trace-retried", {"name": "again", "mode": "retry", "times": 2}, 11),
        ("trace-fan-out", {"name": "tell", "mode": "emit"}, 10),
    ],
)
def test_the_waterfall_of_a_real_trace_is_a_picture_of_the_documentation(
    traced: Traced, browser: Browser, tmp_path: Path, name: str, payload: dict[str, object], spans: int
) -> None:
    """Small, of a known width, and of a trace that is whole."""
    _, trace_id = traced.submit("orders.order.place", payload)
    eventually(lambda: len(traced.spans(trace_id)) == spans, explain=lambda: str(traced.spans(trace_id)))
    file = picture_file(name, tmp_path)

    with trace_page(tmp_path / "traces.db") as url:
        for body in traced.sink.bodies["/v1/traces"]:
            headers = {"content-type": "application/x-protobuf"}
            httpx.post(f"{url}/v1/traces", content=body, headers=headers, trust_env=False).raise_for_status()
        take_picture(browser, url, trace_id, file)

    width, height = png_size(file)
    assert width == WIDTH
    assert height > 400
    assert file.stat().st_size < MAX_BYTES
