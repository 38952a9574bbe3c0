"""The queueing formulas against tables, against exact sums, and against what must hold of any queue."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskmesh.planning.queueing import Station, erlang_b, erlang_c, slots_for

rates = st.floats(0.01, 500)
run_times = st.floats(0.01, 20)
spreads = st.floats(0, 3)


@pytest.mark.parametrize(
    ("slots", "load"), [(1, 0.0101), (2, 0.153), (5, 1.36), (10, 4.46), (20, 12.0), (50, 37.9), (100, 84.1)]
)
def test_erlang_b_is_that_of_the_printed_table(slots, load):
    """The column of 1 % blocking in the tables of traffic engineering, to their three figures."""
    assert erlang_b(slots, load) == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize(("slots", "load"), [(1, "1/2"), (2, "1"), (5, "5/2"), (6, "5/2"), (10, "8"), (30, "28")])
def test_erlang_c_is_the_exact_sum(slots, load):
    """The definition, in fractions: the share of time in which all slots are busy."""
    load = Fraction(load)
    full = load**slots / math.factorial(slots) * slots / (slots - load)
    exact = full / (sum(load**count / math.factorial(count) for count in range(slots)) + full)

    assert erlang_c(slots, float(load)) == pytest.approx(float(exact), rel=1e-12)


def test_a_call_centre_of_six_answers_nine_of_ten_at_once():
    """30 calls an hour of five minutes each: six is the least that lets 90 % through without waiting (Wolfram's example)."""
    assert erlang_c(5, 30 / 12) > 0.1 > erlang_c(6, 30 / 12)


def test_one_slot_waits_as_pollaczek_and_khinchine_say():
    """Half as long for equal runs as for exponential ones, and two and a half times as long at twice the spread."""
    exponential = Station(rate=0.8, run_seconds=1, cv=1, slots=1)
    equal = Station(rate=0.8, run_seconds=1, cv=0, slots=1)
    wide = Station(rate=0.8, run_seconds=1, cv=2, slots=1)

    assert exponential.mean_wait == pytest.approx(0.8 / 0.2)
    assert equal.mean_wait == pytest.approx(exponential.mean_wait / 2)
    assert wide.mean_wait == pytest.approx(exponential.mean_wait * 2.5)


def test_the_tail_of_an_exponential_queue_is_the_known_one():
    """P(wait > t) = C exp(-(slots - load) t / run time), which is exact for M/M/c."""
    station = Station(rate=8, run_seconds=1, cv=1, slots=10)

    assert station.waiting_share * math.exp(-2 * station.wait(95)) == pytest.approx(0.05)
    assert station.wait(50) == 0, "only two of five wait at all"


def test_a_queue_without_enough_slots_grows_without_end():
    station = Station(rate=10, run_seconds=1, cv=1, slots=10)

    assert (station.waiting_share, station.mean_wait, station.wait(50)) == (1, math.inf, math.inf)


@settings(deadline=None)
@given(rates, run_times, spreads, st.floats(0.01, 60), st.sampled_from([50, 90, 95, 99]))
def test_the_slots_found_are_enough_and_one_fewer_is_not(rate, run_seconds, cv, wait, percentile):
    slots = slots_for(rate, run_seconds, cv, wait=wait, percentile=percentile)

    assert Station(rate, run_seconds, cv, slots).wait(percentile) <= wait
    assert slots == 1 or Station(rate, run_seconds, cv, slots - 1).wait(percentile) > wait


@settings(deadline=None)
@given(rates, run_times, spreads, st.integers(1, 50))
def test_more_slots_never_wait_longer(rate, run_seconds, cv, more):
    few = math.floor(rate * run_seconds) + 1
    small, large = (Station(rate, run_seconds, cv, slots) for slots in (few, few + more))

    assert large.mean_wait <= small.mean_wait
    assert large.wait(95) <= small.wait(95)
    assert 0 <= large.waiting_share <= small.waiting_share <= 1
    assert large.utilisation < 1


@settings(deadline=None)
@given(rates, run_times, st.floats(0, 1.5), st.floats(1.01, 2))
def test_a_wider_spread_waits_longer(rate, run_seconds, cv, factor):
    slots = math.ceil(rate * run_seconds) + 1

    assert (
        Station(rate, run_seconds, cv, slots).mean_wait
        <= Station(rate, run_seconds, (cv + 0.01) * factor, slots).mean_wait
    )
