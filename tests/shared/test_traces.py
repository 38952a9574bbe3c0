"""Which trace a message belongs to, told by the spans that are recorded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry import baggage as otel_baggage
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from taskmesh import baggage, telemetry, traces
from taskmesh.celery_protocol import DUE_HEADER, PUBLISHED_HEADER, RECEIVED_HEADER, TRACE_LINKS_HEADER
from taskmesh.recording import SpanRecorder, promised
from taskmesh.traces import Creation, Relation
from taskmesh.worker.spans import AttemptSpan

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = TRACEPARENT.removesuffix("01") + "00"


class Recorder:
    """A recorder, with a sampler that drops whatever nobody has decided on."""

    def __init__(self) -> None:
        self.spans = []
        self.tracer = SpanRecorder(
            ParentBased(ALWAYS_OFF), Resource({}), InstrumentationScope("test"), self.spans.append
        )


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(telemetry, "tracer", lambda: recorder.tracer)
    monkeypatch.setattr(telemetry, "is_exporting", lambda: True)
    return recorder


@pytest.fixture
def allowed():
    """Let one key pass."""
    baggage.allow(["customer-tier"])
    yield
    baggage.allow([])


def request_span(recorder, traceparent=TRACEPARENT):
    return recorder.tracer.start_as_current_span("request", telemetry.extract({"traceparent": traceparent}))


def test_work_wanted_at_once_goes_on_in_the_trace(recorder):
    with request_span(recorder) as span:
        creations = [traces.due(None), traces.due(datetime.now(UTC) - timedelta(seconds=1))]

    for creation in creations:
        assert creation.headers() == {"traceparent": traces.traceparent_of(span.get_span_context())}


def test_work_for_later_begins_a_trace_that_both_ends_know(recorder):
    with request_span(recorder) as span:
        creation = traces.due(datetime.now(UTC) + timedelta(hours=1))

    [request] = recorder.spans
    [link] = request.links
    assert creation.trace_id == format(link.context.trace_id, "032x") != format(request.context.trace_id, "032x")
    assert creation.span_id == format(link.context.span_id, "016x")
    assert link.attributes == {"taskmesh.link": "scheduled_as"}
    assert creation.headers()[TRACE_LINKS_HEADER] == {"scheduled_by": traces.traceparent_of(span.get_span_context())}


def test_another_try_is_linked_to_what_it_is_another_try_of(recorder):
    with request_span(recorder):
        creation = traces.beginning(Relation.REPLAYED, of=UNSAMPLED)

    assert set(creation.links) == {"replayed_by", "replay_of"}
    assert creation.links["replay_of"] == UNSAMPLED


def test_a_new_trace_is_recorded_if_the_one_that_asked_for_it_is(recorder):
    flags = {}
    for traceparent in (TRACEPARENT, UNSAMPLED):
        with request_span(recorder, traceparent):
            flags[traceparent] = traces.beginning(Relation.SCHEDULED).traceparent[-2:]

    assert flags == {TRACEPARENT: "01", UNSAMPLED: "00"}


def test_outside_any_trace_none_begins():
    assert traces.beginning(Relation.SCHEDULED) == Creation()
    assert traces.going_on().headers() == {}


def test_a_promised_span_has_the_ids_that_were_given_away_and_no_other_has(recorder):
    ids = traces.context_of(TRACEPARENT)

    with promised(ids):
        root = recorder.tracer.start_span("root", Context())
    root.end()
    with trace.use_span(root):
        recorder.tracer.start_span("child").end()

    first, second = recorder.spans
    assert (first.context.trace_id, first.context.span_id, first.parent) == (ids.trace_id, ids.span_id, None)
    assert second.context.trace_id == ids.trace_id
    assert second.context.span_id != ids.span_id


@pytest.mark.parametrize("traceparent", [None, "", "00-x-y-01", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_names_no_span(traceparent):
    assert not traces.context_of(traceparent).is_valid
    assert traces.links_to({"retry_of": traceparent} if traceparent else {}) == []


def test_a_batch_has_at_most_as_many_links_as_the_sdk_keeps():
    many = {f"00-{number:032x}-{number:016x}-01" for number in range(1, 300)}

    assert len(traces.members(many)) == traces.MAX_LINKS


def attempt(headers, *, slow_seconds=10.0, fail=False):
    with AttemptSpan("orders.order.place", headers, {"taskmesh.task.attempt": 1}, slow_seconds=slow_seconds) as span:
        span.set("taskmesh.outcome", "failed" if fail else "succeeded")
        if fail:
            span.fail("exception", "builtins.ValueError")


def test_an_attempt_says_how_long_its_task_waited_where(recorder):
    now_us = int(datetime.now(UTC).timestamp() * 1e6)
    times = {DUE_HEADER: now_us - 30_000, PUBLISHED_HEADER: now_us - 20_000, RECEIVED_HEADER: now_us - 5_000}

    attempt({"traceparent": TRACEPARENT, **times})

    [span] = recorder.spans
    assert [event.name for event in span.events] == ["due", "published", "received"]
    assert [event.timestamp // 1000 for event in span.events] == list(times.values())
    assert span.attributes["taskmesh.outbox.dwell_ms"] == pytest.approx(10)
    assert span.attributes["taskmesh.broker.dwell_ms"] == pytest.approx(15)
    assert span.attributes["taskmesh.prefetch.dwell_ms"] >= 5


def test_what_a_stranger_writes_into_the_times_is_no_time(recorder):
    attempt({"traceparent": TRACEPARENT, DUE_HEADER: "yesterday", PUBLISHED_HEADER: -1, RECEIVED_HEADER: 2**70})

    [span] = recorder.spans
    assert span.events == ()


@pytest.mark.parametrize(("fail", "slow_seconds"), [(True, 10.0), (False, 0.0)], ids=["failed", "slow"])
def test_an_attempt_worth_a_look_is_exported_though_its_trace_is_not_sampled(recorder, fail, slow_seconds):
    attempt({"traceparent": UNSAMPLED}, fail=fail, slow_seconds=slow_seconds)

    [span] = recorder.spans
    assert span.attributes["taskmesh.sampled_late"] is True
    assert span.attributes["taskmesh.outcome"] == ("failed" if fail else "succeeded")
    assert span.context.trace_id == traces.context_of(UNSAMPLED).trace_id
    assert span.parent.span_id == traces.context_of(UNSAMPLED).span_id
    assert span.status.is_ok is not fail


def test_an_attempt_without_anything_to_see_stays_unsampled(recorder):
    attempt({"traceparent": UNSAMPLED})

    assert recorder.spans == []


@pytest.mark.usefixtures("allowed")
def test_baggage_passes_by_the_allow_list_only():
    carried = {"baggage": "customer-tier=gold,session=secret,email=a%40b.example"}

    within = baggage.extract(carried, Context())

    assert otel_baggage.get_all(within) == {"customer-tier": "gold"}
    token = context.attach(within)
    try:
        assert baggage.current() == "customer-tier=gold"
        assert traces.going_on().headers() == {"baggage": "customer-tier=gold"}
    finally:
        context.detach(token)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("carried", ["customer-tier=" + "x" * 257, "customer-tier", "", 7, None])
def test_baggage_that_is_none_is_left_out(carried):
    assert otel_baggage.get_all(baggage.extract({"baggage": carried}, Context())) == {}


def test_no_baggage_passes_by_default():
    assert otel_baggage.get_all(baggage.extract({"baggage": "customer-tier=gold"}, Context())) == {}


@pytest.mark.usefixtures("allowed")
def test_an_attempt_has_its_message_s_baggage(recorder):
    headers = {"traceparent": TRACEPARENT, "baggage": "customer-tier=gold,session=secret"}

    with AttemptSpan("orders.order.place", headers, {}, slow_seconds=10):
        within = baggage.current()

    assert within == "customer-tier=gold"
    assert baggage.current() is None


def test_a_span_that_nobody_records_still_gives_its_trace_to_what_waits():
    ids = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(0))
    with trace.use_span(NonRecordingSpan(ids)):
        creation = traces.beginning(Relation.SCHEDULED)

    assert creation.trace_id
    assert creation.traceparent.endswith("-00")
