"""Spans reach a real collector, or are missed and counted, and nothing waits for that."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, SpanContext

from running_orders import orders_service
from taskmesh import exporting
from taskmesh.exporting import FLUSH_SECONDS, REPEAT_SECONDS, Outage
from taskmesh.metrics.provider import STOP_SECONDS
from taskmesh.testing.otlp import OtlpSink
from taskmesh.testing.waiting import eventually

SPANS = Path(__file__).parents[1] / "services" / "spans.py"


class Spans:
    """A process with telemetry, made to end spans."""

    def __init__(self, endpoint: str, **variables: str) -> None:
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}
        self._process = subprocess.Popen(
            [sys.executable, str(SPANS)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, command: str) -> None:
        """Have a command carried out."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        while self._process.stdout.readline().strip() != "done":
            pass

    def end(self) -> list[str]:
        """Have it end as a role does; what it has printed since the last command."""
        printed, _ = self._process.communicate("stop\n", timeout=60)
        assert self._process.returncode == 0
        return printed.splitlines()


class Sender:
    """This process's own sender, which reports what it drops."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.sender = exporting.processor(self.dropped.append)
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(self.sender)

    def end_spans(self, *names: str, links: int = 0) -> None:
        tracer = self._provider.get_tracer("test")
        linked = [Link(SpanContext(number, number, is_remote=True)) for number in range(1, links + 1)]
        for name in names:
            tracer.start_span(name, links=linked).end()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that takes half a second for each attempt, and as long between two."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


@pytest.fixture
def sender(impatient: None, otlp_sink: OtlpSink, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.endpoint)
    sender = Sender()
    yield sender
    otlp_sink.gate.set()
    sender.sender.shutdown()


def names(sink: OtlpSink) -> list[str]:
    return [span.name for span in sink.spans]


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the sender logged; OpenTelemetry's own lines are silenced where logs are set up."""
    return [record for record in caplog.records if record.name == "taskmesh.exporting"]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in said(caplog)]


def logged(lines: list[str], message: str) -> list[dict[str, Any]]:
    """The log lines with a message."""
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line["message"] == message]


def test_the_last_spans_of_a_process_are_sent_when_it_ends(otlp_sink):
    """They were in the queue, where they would have waited for a minute."""
    process = Spans(otlp_sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="60000")
    process.tell("make 700")

    printed = process.end()

    assert len(otlp_sink.spans) == 700
    assert len({span.span_id for span in otlp_sink.spans}) == 700
    assert printed == []


def test_a_warm_shutdown_of_a_worker_loses_no_span(postgres, rabbitmq, otlp_sink, tmp_path):
    """Each child of the pool sends what it has before it ends."""
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with orders_service(postgres, rabbitmq, tmp_path, "relay", **variables) as orders:
        orders.start("worker", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.endpoint)
        sent = {orders.send("orders.order.place", name=f"order {number}") for number in range(40)}
        for task_id in sent:
            orders.wait(task_id)

        orders.stop_role("worker")

    seen = [span for span in otlp_sink.spans if span.name == "process orders.order.place"]
    assert sorted(str(span.attributes["taskmesh.task.id"]) for span in seen) == sorted(sent)
    assert len({span.resource["service.instance.id"] for span in seen}) == 2


@pytest.mark.parametrize("collector", ["away", "hanging", "unavailable"])
def test_the_end_of_a_process_waits_for_no_collector(collector):
    """It takes a few seconds at most, and says how many spans were lost."""
    with OtlpSink() as sink:
        endpoint = sink.endpoint
        if collector == "hanging":
            sink.gate.clear()
        sink.status = 503
        process = Spans("http://127.0.0.1:1" if collector == "away" else endpoint)
        process.tell("make 600")

        began = time.monotonic()
        printed = process.end()
        seconds = time.monotonic() - began

    assert seconds < FLUSH_SECONDS + STOP_SECONDS + 5
    [line] = logged(printed, "spans lost at the end")
    assert line["dropped"] == 600
    assert sum(int(line.split()[1]) for line in printed if line.startswith("dropped")) == 600


def test_spans_wait_for_a_collector_that_was_stopped(impatient, monkeypatch, caplog):
    """They arrive once it is back, each once; the log says both."""
    caplog.set_level("INFO", logger="taskmesh.exporting")
    with OtlpSink() as first:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", first.endpoint)
        sender = Sender()
        sender.end_spans("before")
        first.wait_for(1)
    sender.end_spans("during")
    eventually(lambda: "spans not exported" in messages(caplog))

    with OtlpSink(first.port) as second:
        sender.end_spans("after")
        second.wait_for(2)
        eventually(lambda: "spans exported again" in messages(caplog))
        sender.sender.shutdown()

    assert names(second) == ["during", "after"]
    assert messages(caplog) == ["spans not exported", "spans exported again"]
    assert sender.dropped == []


def test_spans_wait_for_a_collector_that_says_it_is_unavailable(sender, otlp_sink, caplog):
    """503 means: later."""
    otlp_sink.status = 503
    sender.end_spans("early")
    eventually(lambda: "spans not exported" in messages(caplog))

    otlp_sink.status = 200

    assert [span.name for span in otlp_sink.wait_for(1)] == ["early"]
    assert said(caplog)[0].__dict__["reason"] == 503
    assert sender.dropped == []


def test_spans_that_the_collector_refuses_are_dropped_and_counted(sender, otlp_sink, caplog):
    """400 means: never."""
    otlp_sink.status = 400
    sender.end_spans("refused", "refused")
    eventually(lambda: sender.dropped)

    otlp_sink.status = 200
    sender.end_spans("taken")

    assert [span.name for span in otlp_sink.wait_for(1)] == ["taken"]
    assert sum(sender.dropped) == 2
    assert [record.__dict__["dropped"] for record in said(caplog)] == [2]


def test_the_queue_is_bounded_and_the_oldest_spans_give_way(sender, otlp_sink, monkeypatch):
    """What a hanging collector does not take is counted, and the newest are kept."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    small = Sender()
    otlp_sink.gate.clear()
    small.end_spans("first")
    eventually(lambda: otlp_sink.requests)

    small.end_spans(*(str(number) for number in range(100)))
    otlp_sink.gate.set()

    eventually(lambda: "99" in names(otlp_sink))
    small.sender.shutdown()
    assert sum(small.dropped) == 90
    assert set(names(otlp_sink)) == {"first", *(str(number) for number in range(90, 100))}


def test_spans_with_many_links_leave_less_room(sender, otlp_sink, monkeypatch):
    """A batch of a hundred messages takes as much memory as twenty other spans."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "30")
    small = Sender()
    otlp_sink.gate.clear()
    small.end_spans("first")
    eventually(lambda: otlp_sink.requests)

    small.end_spans("one", "two", links=100)
    otlp_sink.gate.set()

    eventually(lambda: "two" in names(otlp_sink))
    small.sender.shutdown()
    assert sum(small.dropped) == 1
    assert "one" not in names(otlp_sink)


def test_a_failed_attempt_keeps_no_request_in_memory(impatient, monkeypatch):
    """Errors and frames refer to each other; what hung on them would stay until a full collection of garbage."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    sender = Sender()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        sender.end_spans(*["span"] * 500)
        sender.sender.force_flush()
        gc.collect()
        frames = [each for each in gc.garbage if isinstance(each, FrameType)]
        held = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, bytes)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
        sender.sender.shutdown()

    assert sum(sender.dropped) == 500
    assert not [value for value in held if len(value) > 10_000]


def test_a_slow_collector_gets_everything_that_the_queue_holds(sender, otlp_sink, caplog):
    """One that answers late is not away."""
    otlp_sink.gate.clear()
    sender.end_spans("one")
    eventually(lambda: otlp_sink.requests)
    sender.end_spans("two", "three")

    otlp_sink.gate.set()

    assert sender.sender.force_flush(10_000)
    assert {"one", "two", "three"} == set(names(otlp_sink))
    assert sender.dropped == []


def test_a_flush_gives_up_in_time(sender, otlp_sink):
    """Its caller waits no longer than it said."""
    otlp_sink.gate.clear()
    sender.end_spans("one")

    began = time.monotonic()

    assert not sender.sender.force_flush(300)
    assert time.monotonic() - began < 5


def test_a_process_that_is_forked_off_sends_its_own_spans_only(otlp_sink):
    """The parent's are the parent's to send."""
    process = Spans(otlp_sink.endpoint, OTEL_BSP_SCHEDULE_DELAY="60000")
    process.tell("make 3")
    process.tell("fork")
    assert names(otlp_sink) == ["span of the child"]

    process.end()

    assert sorted(names(otlp_sink)) == ["span 0", "span 1", "span 2", "span of the child"]


def test_an_outage_is_told_of_once_a_minute(caplog):
    """Each line counts what was dropped since the one before."""
    now = [1000.0]
    outage = Outage(lambda: now[0])
    for _ in range(int(3 * REPEAT_SECONDS)):
        outage.tell(dropped=5, waiting=2048, failing=True, reason="ConnectionError")
        now[0] += 1

    assert messages(caplog) == ["spans not exported"] * 3
    assert [record.__dict__["dropped"] for record in said(caplog)] == [5, 300, 300]


def test_a_collector_that_comes_and_goes_is_told_of_once_a_minute(caplog):
    """What was dropped in between is told when it is back."""
    caplog.set_level("INFO", logger="taskmesh.exporting")
    now = [1000.0]
    outage = Outage(lambda: now[0])
    for _ in range(29):
        outage.tell(dropped=1, waiting=0, failing=False, reason=400)
        outage.tell(dropped=0, waiting=0, failing=False, reason=200)
        now[0] += 2

    assert messages(caplog) == ["spans not exported", "spans exported again"]

    now[0] += 2
    outage.tell(dropped=0, waiting=0, failing=False, reason=200)

    assert messages(caplog)[2:] == ["spans not exported"]
    assert said(caplog)[2].__dict__["dropped"] == 28
