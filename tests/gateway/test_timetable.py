"""When schedules fire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.timetable import InvalidTimetable, Timetable

BERLIN = ZoneInfo("Europe/Berlin")
ANCHOR = datetime(2026, 1, 1, tzinfo=UTC)
NIGHTLY = Timetable(cron="30 2 * * *", timezone="Europe/Berlin", anchor_at=ANCHOR)


def every(seconds: float, **bounds: Any) -> Timetable:
    """Return an interval from the anchor on."""
    return Timetable(interval=timedelta(seconds=seconds), anchor_at=ANCHOR, **bounds)


def test_a_nightly_line_fires_once_each_night_of_2026_in_berlin() -> None:
    """02:30 fires once on each of the 365 nights, also on those when the clocks change."""
    fires = NIGHTLY.fires_between(datetime(2025, 12, 31, 22, tzinfo=UTC), datetime(2026, 12, 31, 22, tzinfo=UTC), 1000)

    nights = [fire.astimezone(BERLIN).date() for fire in fires]
    assert len(nights) == 365
    assert len(set(nights)) == 365
    odd = {str(fire.astimezone(BERLIN)) for fire in fires if fire.astimezone(BERLIN).time().isoformat() != "02:30:00"}
    assert odd == {"2026-03-29 03:00:00+02:00"}


def test_asking_again_after_every_minute_never_goes_back() -> None:
    """However the time that is asked about lies in the two equal hours, the next fire lies ahead of it."""
    moment = datetime(2026, 10, 24, 23, tzinfo=UTC)
    fires = set()
    for _ in range(300):
        fire = NIGHTLY.next_after(moment)
        assert fire is not None
        assert fire > moment
        fires.add(fire)
        moment += timedelta(minutes=1)

    assert fires == {datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 10, 26, 1, 30, tzinfo=UTC)}


def test_an_hourly_line_fires_every_hour_that_passes() -> None:
    """A line with a star in the hour follows the clock: 48 fires in 48 hours around the second 02:30."""
    hourly = Timetable(cron="30 * * * *", timezone="Europe/Berlin", anchor_at=ANCHOR)
    start = datetime(2026, 10, 24, 12, tzinfo=UTC)

    fires = hourly.fires_between(start, start + timedelta(hours=48), 100)

    assert len(fires) == 48
    assert {later - earlier for earlier, later in pairwise(fires)} == {timedelta(hours=1)}


def test_an_interval_does_not_drift() -> None:
    """The millionth fire is where it belongs to the microsecond, and no fire is at the anchor itself."""
    timetable = every(2.5)

    assert timetable.next_after(ANCHOR) == ANCHOR + timedelta(seconds=2.5)
    assert timetable.next_after(ANCHOR + timedelta(seconds=2_499_998.7)) == ANCHOR + timedelta(seconds=2_500_000)


def test_an_interval_starts_at_starts_at_and_stops_at_ends_at() -> None:
    """Both ends are fires."""
    starts_at = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
    timetable = every(60, starts_at=starts_at, ends_at=starts_at + timedelta(minutes=2))

    fires = timetable.preview(ANCHOR, 5)

    assert fires == [starts_at, starts_at + timedelta(minutes=1), starts_at + timedelta(minutes=2)]


def test_a_cron_line_may_fire_at_starts_at() -> None:
    """The start is included."""
    starts_at = datetime(2026, 5, 1, 0, 30, tzinfo=UTC)
    timetable = Timetable(cron="30 2 * * *", timezone="Europe/Berlin", anchor_at=ANCHOR, starts_at=starts_at)

    assert timetable.next_after(ANCHOR) == starts_at


@pytest.mark.parametrize("cron", ["* * * * *", "30 2 * * *", "0 0 1 1 *", "0 0 29 2 *", "*/7 3 * * MON-FRI"])
def test_the_last_fire_is_the_one_before_the_next(cron: str) -> None:
    """`last_until` agrees with walking forward, however rare the fires are."""
    timetable = Timetable(cron=cron, timezone="Europe/Berlin", anchor_at=ANCHOR)
    moment = datetime(2026, 10, 25, 1, 10, 5, tzinfo=UTC)

    last = timetable.last_until(moment)

    assert last is not None
    assert last <= moment
    following = timetable.next_after(last)
    assert following is not None
    assert following > moment


@given(st.floats(1, 100_000), st.integers(0, 10**12))
def test_last_and_next_of_an_interval_are_one_interval_apart(seconds: float, microseconds: int) -> None:
    """Whatever the interval and the moment."""
    timetable = every(seconds)
    moment = ANCHOR + timedelta(days=2, microseconds=microseconds)

    last, following = timetable.last_until(moment), timetable.next_after(moment)

    assert last is not None
    assert following is not None
    assert last <= moment < following
    assert following - last == timetable.interval


def test_an_interval_has_no_last_fire_before_its_first() -> None:
    """Nothing lies behind a schedule that has just been made."""
    assert every(60).last_until(ANCHOR + timedelta(seconds=59)) is None
    assert every(60).last_until(ANCHOR + timedelta(seconds=60)) == ANCHOR + timedelta(seconds=60)


@pytest.mark.parametrize(
    ("fields", "wrong", "says"),
    [
        ({}, "cron", "either cron or interval_seconds"),
        ({"cron": "* * * * *", "interval": timedelta(seconds=5)}, "cron", "not both"),
        ({"cron": "61 * * * *"}, "cron", "bad minute"),
        ({"cron": "* * *"}, "cron", "five fields"),
        ({"cron": "0 * * * * *"}, "cron", "five fields"),
        ({"cron": "* " * 200}, "cron", "at most 200"),
        ({"cron": "0 0 30 2 *"}, "cron", "bad day-of-month"),
        ({"cron": "0 0 * * *", "timezone": "Europe/Berln"}, "timezone", "did you mean Europe/Berlin?"),
        ({"cron": "0 0 * * *", "timezone": "../etc/passwd"}, "timezone", "IANA"),
        ({"cron": "0 0 * * *", "timezone": "Europe"}, "timezone", "not a known"),
        ({"cron": "0 0 * * *", "timezone": "localtime"}, "timezone", "not a known"),
        ({"interval": timedelta(milliseconds=999)}, "interval_seconds", "at least 1 second"),
        ({"interval": timedelta(days=4000)}, "interval_seconds", "ten years"),
        ({"cron": "0 0 * * *", "ends_at": datetime(9999, 1, 1, tzinfo=UTC)}, "ends_at", "2200"),
        ({"cron": "0 0 * * *", "starts_at": datetime(1, 1, 1, tzinfo=UTC)}, "starts_at", "1970"),
        (
            {"cron": "0 0 * * *", "starts_at": ANCHOR, "ends_at": ANCHOR - timedelta(days=1)},
            "ends_at",
            "before starts_at",
        ),
    ],
)
def test_a_wrong_timetable_names_its_field(fields: dict[str, Any], wrong: str, says: str) -> None:
    """Every mistake is told with the field that it is in."""
    with pytest.raises(InvalidTimetable) as caught:
        Timetable(anchor_at=ANCHOR, **fields)

    assert caught.value.field == wrong
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("timetable", "wrong"),
    [
        (every(60, ends_at=ANCHOR + timedelta(seconds=59)), "ends_at"),
        (Timetable(cron="0 0 */31 2 MON#5", anchor_at=ANCHOR), "cron"),
        (Timetable(cron="0 0 * 2 MON#5,TUE#5", anchor_at=ANCHOR, ends_at=datetime(2026, 2, 28, tzinfo=UTC)), "ends_at"),
    ],
)
def test_a_timetable_without_a_fire_is_refused(timetable: Timetable, wrong: str) -> None:
    """A schedule that could never fire is a mistake."""
    with pytest.raises(InvalidTimetable, match="never fire") as caught:
        timetable.check_fires(ANCHOR)

    assert caught.value.field == wrong


@given(st.text(alphabet="0123456789*/,-L#W MONSUNJAN", max_size=30))
def test_any_text_is_a_cron_line_or_a_clear_refusal(text: str) -> None:
    """No input gets past the check as another exception."""
    try:
        timetable = Timetable(cron=text, anchor_at=ANCHOR)
    except InvalidTimetable:
        return
    timetable.next_after(ANCHOR)
