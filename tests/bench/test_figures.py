"""What the benchmark makes of its measurements."""

from __future__ import annotations

import pytest

from meshbench.figures import latencies, percentile, ratio, spreads


@pytest.mark.parametrize(("share", "expected"), [(0.1, 1), (50, 50), (50.1, 51), (99, 99), (99.9, 100), (100, 100)])
def test_a_percentile_is_a_value_that_was_measured(share, expected):
    assert percentile(range(1, 101), share) == expected


def test_the_percentiles_of_one_value_are_that_value():
    assert set(latencies([0.25]).values()) == {250.0}


def test_no_latencies_have_no_percentiles():
    assert latencies([]) == {}


def test_a_spread_is_the_median_with_the_least_and_the_most():
    spread = spreads([{"rate": 3.0}, {"rate": 1.0}, {"rate": 9.0}])["rate"]

    assert (spread.median, spread.least, spread.most) == (3, 1, 9)


def test_a_ratio_is_that_of_the_medians_with_the_range_of_the_rounds():
    """A machine that is slow for one round is slow for both, so what it does to the ratio is seen in the range."""
    turns = {
        "ours": [{"rate": 100.0}, {"rate": 10.0}, {"rate": 120.0}],
        "theirs": [{"rate": 50.0}, {"rate": 5.0}, {"rate": 40.0}],
    }

    found = ratio(turns, "rate", "ours", "theirs")

    assert (found.median, found.least, found.most) == (2.5, 2, 3)


def test_what_one_of_the_two_has_not_measured_has_no_ratio():
    assert ratio({"ours": [{"rate": 1.0}], "theirs": [{"p50": 1.0}]}, "rate", "ours", "theirs") is None
