"""Broken traces are found, and named, among whole ones."""

from __future__ import annotations

import pytest

from taskmesh_local.wholeness import Seen, compare

WHOLE = [("1", "", "POST /v1/tasks"), ("2", "1", "publish"), ("3", "1", "process"), ("4", "3", "smtp send")]


def trace(*spans):
    return [Seen(span_id=span_id, parent_id=parent_id, name=name) for span_id, parent_id, name in spans]


def among_whole_ones(*spans):
    """What is found of a trace beside three whole ones of its kind."""
    traces = {name: trace(*WHOLE) for name in ("a", "b", "c")} | {"odd": trace(*spans)}
    found = compare(traces, dict.fromkeys(traces, "mail, succeeded"))
    assert set(found.broken) <= {"odd"}
    return found.broken.get("odd")


def test_traces_of_one_shape_are_whole():
    assert among_whole_ones(*reversed(WHOLE)) is None


def test_an_orphan_is_named():
    assert among_whole_ones(*WHOLE[:2], WHOLE[3]) == ["smtp send is an orphan", "0 of process in place of 1"]


def test_a_span_that_is_missing_without_an_orphan_is_named():
    assert among_whole_ones(*WHOLE[:3]) == ["0 of smtp send in place of 1"]


def test_one_too_many_is_named():
    assert among_whole_ones(*WHOLE, ("5", "3", "smtp send")) == ["2 of smtp send in place of 1"]


def test_a_span_that_is_there_twice_is_named():
    assert "span 4 is there 2 times" in (among_whole_ones(*WHOLE, WHOLE[3]) or ())


def test_a_second_root_is_named():
    assert "2 roots: POST /v1/tasks, publish" in (among_whole_ones(WHOLE[0], ("2", "", "publish"), *WHOLE[2:]) or ())


def test_a_trace_of_which_nothing_came_is_named():
    assert among_whole_ones() == ["no span has come"]


@pytest.mark.parametrize("kind", ["mail, failed", "invoice, succeeded"])
def test_each_kind_has_its_own_shape(kind):
    """Another request, or another outcome, may have other spans."""
    traces = {"a": trace(*WHOLE), "b": trace(*WHOLE), "c": trace(*WHOLE[:3])}

    found = compare(traces, {"a": "mail, succeeded", "b": "mail, succeeded", "c": kind})

    assert found.broken == {}
    assert found.shape_count == 2
    assert found.kinds == {"mail, succeeded": 2, kind: 1}
