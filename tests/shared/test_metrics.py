"""Instruments record nothing unasked, admit few values, and lose nothing of a process that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.trace import SpanContext

from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.instruments import OTHER, Attribute, Counter, Gauge, Histogram, Instrument
from taskmesh.metrics.pool import Channel

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"

COUNTED = Counter("test.counted", "{thing}", "Things.", Attribute("way", values=["well", "badly"]))
TIMED = Histogram("test.timed", "s", "Times.")
SHOWN = Gauge("test.shown", "{thing}", "Things.", Attribute("place.name", limit=2))


class Kept:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, float, Mapping[str, str], SpanContext | None]] = []

    def measure(
        self, instrument: Instrument, value: float, attributes: Mapping[str, str], origin: SpanContext | None
    ) -> None:
        self.taken.append((instrument.name, value, attributes, origin))

    def sum(self, name: str) -> float:
        return sum(value for taken, value, _, _ in self.taken if taken == name)


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What the process measures during the test."""
    sink = Kept()
    instruments.send_to(sink)
    yield sink
    instruments.send_to(None)


def test_a_measurement_has_the_attributes_that_are_given(kept):
    COUNTED.add(2, way="well")
    COUNTED.add(way=None)
    TIMED.record(0.5)

    assert [taken[:3] for taken in kept.taken] == [
        ("test.counted", 2, {"way": "well"}),
        ("test.counted", 1, {}),
        ("test.timed", 0.5, {}),
    ]


def test_an_attribute_that_is_not_declared_is_a_mistake(kept):
    with pytest.raises(KeyError):
        COUNTED.add(whereabouts="here")


def test_a_time_below_nothing_is_nothing(kept):
    """Two machines' clocks differ."""
    TIMED.record(-3.0)

    assert kept.taken[0][1] == 0


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (SAMPLED, TRACE),
        (f"00-{TRACE}-b7ad6b7169203331-00", None),
        ("junk", None),
        ("", None),
        (7, None),
        (None, None),
    ],
    ids=["sampled", "not sampled", "junk", "empty", "no text", "no current span"],
)
def test_a_measurement_is_an_example_of_a_trace_that_is_recorded(kept, traceparent, trace_id):
    TIMED.record(1, traceparent)

    [(_, _, _, origin)] = kept.taken
    assert (None if origin is None else f"{origin.trace_id:032x}") == trace_id


def test_what_is_not_in_a_closed_list_is_other():
    attribute = Attribute("state", values=["open"])

    assert [attribute.admit(value) for value in ("open", "shut")] == ["open", OTHER]


def test_what_does_not_fit_the_pattern_or_comes_too_late_is_other():
    attribute = Attribute("type", pattern=r"[a-z.]+", limit=2)

    admitted = [attribute.admit(value) for value in ("a.b", "not one!", "c.d", "e.f", "a.b")]

    assert admitted == ["a.b", OTHER, "c.d", OTHER, "a.b"]


@pytest.mark.parametrize("value", ["0af76519-16cd-43dd-8448-eb211c80319c", "ada@example.org", "", "x" * 300, "nodots"])
def test_no_type_is_an_id_or_an_address(value):
    assert catalogue.TYPE.admit(value) == OTHER


def test_a_gauge_shows_what_it_was_last_told_and_nothing_once_it_is_hidden():
    SHOWN.show([(1, {"place_name": "a"}), (2, {"place_name": "b"})])
    SHOWN.show([(3, {"place_name": "a"})])
    assert SHOWN.read() == [(3, {"place.name": "a"})]

    SHOWN.hide()

    assert SHOWN.read() == []


def test_values_of_a_gauge_that_became_other_are_added_up():
    SHOWN.show([(1, {"place_name": name}) for name in ("a", "b", "c", "d")])

    assert SHOWN.read()[-1] == (2, {"place.name": OTHER})
    SHOWN.hide()


def test_a_gauge_that_is_watched_is_looked_up_whenever_it_is_read():
    things: list[int] = []
    SHOWN.watch(lambda: len(things))
    things.append(1)

    assert SHOWN.read() == [(1, {})]
    SHOWN.hide()


def in_child(channel: Channel, act: Any) -> int:
    """Do something in a fork that measures through the channel; returns the signal that it died of."""
    pid = os.fork()
    if pid == 0:
        channel.send_from_child()
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_child_has_measured_outlives_it(kept):
    channel = Channel()

    def measure_and_die() -> None:
        COUNTED.add(3, way="badly")
        TIMED.record(0.5, SAMPLED)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(channel, measure_and_die) == -signal.SIGKILL
    channel.receive(kept)
    channel.stop()

    [counted, (name, value, _, origin)] = kept.taken
    assert counted == ("test.counted", 3, {"way": "badly"}, None)
    assert (name, value) == ("test.timed", 0.5)
    assert origin is not None
    assert f"{origin.trace_id:032x}" == TRACE


def test_a_child_never_waits(kept):
    """Nobody receives while it measures, and there is no room for so much."""
    channel = Channel()

    def flood() -> None:
        for _ in range(20_000):
            COUNTED.add()

    assert in_child(channel, flood) == 0
    channel.receive(kept)
    channel.stop()

    received = kept.sum("test.counted")
    assert 10 < received < 20_000


def test_what_was_dropped_is_told_as_soon_as_there_is_room(kept):
    """Of 20,000 measurements each is received or counted as dropped, but for those after the last that was sent."""
    channel = Channel()
    channel.receive(kept)

    def flood() -> None:
        for _ in range(20_000):
            COUNTED.add()
        # A child has other things to do in between; this one waits until its parent has caught up.
        sender = channel._sender
        sender.setblocking(True)
        COUNTED.add()

    assert in_child(channel, flood) == 0
    channel.stop()

    assert kept.sum("test.counted") + kept.sum("taskmesh.telemetry.dropped") == 20_001


def test_a_process_ends_in_time_and_in_order_while_the_collector_is_away():
    """Nobody listens at the port; the page's reader is there, too, and is not asked too late."""
    program = """
import time
from taskmesh import telemetry
from taskmesh.metrics import catalogue, provider
from taskmesh.settings import ServiceSettings
settings = ServiceSettings(database_url="postgresql://x", amqp_url="amqp://x", metrics_port=0)
provider.start(telemetry.resource("test", "worker"), "1", settings)
catalogue.TASKS_ACCEPTED.add(type="a.b.c", service="a")
began = time.monotonic()
provider.stop()
print(time.monotonic() - began < provider.STOP_SECONDS + 10)
"""
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    away = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    done = subprocess.run([sys.executable, "-c", program], env=away, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True"]


def test_without_exporters_nothing_is_recorded_and_no_thread_runs():
    program = """
import threading, time
from taskmesh import telemetry
from taskmesh.metrics import catalogue, instruments
from taskmesh.settings import ServiceSettings
settings = ServiceSettings(database_url="postgresql://x", amqp_url="amqp://x")
telemetry.start("test", "worker", settings)
began = time.process_time()
for _ in range(100_000):
    catalogue.TASK_DURATION.record(1.0, type="a.b.c", service="a", state="succeeded")
print(instruments.is_on(), threading.active_count(), time.process_time() - began < 1)
telemetry.stop()
"""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TASKMESH_"))}
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "1", "True"]
