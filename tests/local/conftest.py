"""A trace page, and services whose spans it receives."""

from __future__ import annotations

import gzip

import pytest
from fastapi.testclient import TestClient

from taskmesh_local.spans import Spans
from taskmesh_local.traces import application
from told_spans import Exports


@pytest.fixture
def spans(tmp_path):
    return Spans(tmp_path / "traces.db")


@pytest.fixture
def page(spans):
    return TestClient(application(spans, lambda: "http://gateway.test"))


@pytest.fixture
def exports(page):
    """Services whose spans go to the page, gzipped as exporters send them."""

    def send(body):
        headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
        assert page.post("/v1/traces", content=gzip.compress(body), headers=headers).status_code == 200

    return Exports(send)
