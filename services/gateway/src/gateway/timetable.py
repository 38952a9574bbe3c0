"""When a schedule fires: pure arithmetic on time, no clock, no database.

A timetable is either a cron line in an IANA time zone or an interval. All results are in UTC.

Cron follows Debian's cron where clocks change (https://manpages.debian.org/stable/cron/cron.8.en.html): a line that
names its minute and hour fires once on such a night, at the first moment after a skipped time and at the first of two
equal times; a line with `*` in its minute or hour follows the clock, so an hourly line fires every hour that passes.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

SHORTEST_INTERVAL = timedelta(seconds=1)
LONGEST_INTERVAL = timedelta(days=3660)
CRON_FIELDS = 5
CRON_MAX_LENGTH = 200
FIRST_YEAR, LAST_YEAR = 1970, 2200
"""Outside of them a date is a typing error, and arithmetic nears the ends of the calendar."""

_INSTANT = timedelta(microseconds=1)
_LOOK_BACK = (timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366), timedelta(days=366 * 9))
"""Each step finds the last fire of a rarer timetable; nine years hold a 29 February even around a year like 2100."""


class InvalidTimetable(ValueError):
    """The timetable cannot be followed.

    Attributes:
        field: The name of the field that is wrong.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """The fire times of one schedule; building one validates it.

    Attributes:
        cron: Five fields: minute, hour, day of month, month, day of week; read in `timezone`.
        timezone: An IANA name, such as `Europe/Berlin`.
        interval: Fires at `anchor_at` plus whole multiples, so that lateness never adds up.
        anchor_at: Where an interval is counted from when there is no `starts_at`.
        starts_at: No fire before it; an interval's first fire is at this very moment.
        ends_at: No fire after it.

    Raises:
        InvalidTimetable: Names the wrong field.
    """

    anchor_at: datetime
    cron: str | None = None
    timezone: str = "UTC"
    interval: timedelta | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_zone", _zone(self.timezone))
        if (self.cron is None) == (self.interval is None):
            raise InvalidTimetable("cron", "give either cron or interval_seconds, and not both")
        if self.cron is not None:
            _check_cron(self.cron)
        if self.interval is not None:
            _check_interval(self.interval)
        for name, moment in (("starts_at", self.starts_at), ("ends_at", self.ends_at)):
            if moment is not None and not FIRST_YEAR <= moment.year <= LAST_YEAR:
                raise InvalidTimetable(name, f"must be in the years {FIRST_YEAR} to {LAST_YEAR}")
        if self.starts_at is not None and self.ends_at is not None and self.ends_at < self.starts_at:
            raise InvalidTimetable("ends_at", "must not be before starts_at")

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first fire later than `moment`, or None when there is no more."""
        return next(self.after(moment), None)

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Yield the fires later than `moment`, in order; without end unless `ends_at` is set."""
        floor = moment.astimezone(UTC)
        if self.starts_at is not None:
            floor = max(floor, self.starts_at.astimezone(UTC) - _INSTANT)
        fires = self._cron_after(floor) if self.interval is None else self._multiples_after(floor, self.interval)
        if self.ends_at is None:
            return fires
        ends_at = self.ends_at
        return takewhile(lambda fire: fire <= ends_at, fires)

    def preview(self, moment: datetime, count: int) -> list[datetime]:
        """Return the next `count` fires later than `moment`; fewer when the timetable ends."""
        return list(islice(self.after(moment), count))

    def fires_between(self, after: datetime, until: datetime, limit: int) -> list[datetime]:
        """Return at most `limit` fires later than `after` and not later than `until`, oldest first."""
        return list(islice(takewhile(lambda fire: fire <= until, self.after(after)), limit))

    def last_until(self, moment: datetime) -> datetime | None:
        """Return the newest fire not later than `moment`, or None if there was none in the past nine years.

        The cost does not grow with the number of fires that lie behind: a schedule may come back after a long time.
        """
        moment = moment.astimezone(UTC)
        if self.ends_at is not None:
            moment = min(moment, self.ends_at.astimezone(UTC))
        if self.interval is not None:
            origin = self._origin()
            steps = (moment - origin) // self.interval
            return origin + steps * self.interval if steps >= self._first_step() else None
        for reach in _LOOK_BACK:
            newest = deque(takewhile(lambda fire: fire <= moment, self.after(moment - reach)), maxlen=1)
            if newest:
                return newest[0]
        return None

    def check_fires(self, moment: datetime) -> datetime:
        """Return the first fire later than `moment`.

        Raises:
            InvalidTimetable: There is none.
        """
        fire = self.next_after(moment)
        if fire is not None:
            return fire
        if self.ends_at is not None:
            raise InvalidTimetable("ends_at", "the schedule would never fire: there is no fire left before ends_at")
        raise InvalidTimetable("cron", "the schedule would never fire: no such date comes up")

    def _origin(self) -> datetime:
        return (self.starts_at or self.anchor_at).astimezone(UTC)

    def _first_step(self) -> int:
        # The moment a schedule was made is where its interval is counted from, not a fire.
        return 0 if self.starts_at is not None else 1

    def _multiples_after(self, floor: datetime, interval: timedelta) -> Iterator[datetime]:
        origin = self._origin()
        step = max(self._first_step(), (floor - origin) // interval + 1)
        while True:
            fire = origin + step * interval
            if fire.year > LAST_YEAR:
                return
            yield fire
            step += 1

    def _cron_after(self, floor: datetime) -> Iterator[datetime]:
        # CronSim reads a fixed line by the wall clock. Started in the second of two equal hours it offers the times
        # of the first one again, which lie behind `floor`: only what is later counts.
        for local in CronSim(self.cron or "", floor.astimezone(self._zone)):
            fire = local.astimezone(UTC)
            if fire > floor:
                floor = fire
                yield fire


def _check_cron(line: str) -> None:
    if len(line) > CRON_MAX_LENGTH:
        raise InvalidTimetable("cron", f"must be at most {CRON_MAX_LENGTH} characters long")
    if len(line.split()) != CRON_FIELDS:
        raise InvalidTimetable(
            "cron",
            "must have five fields: minute, hour, day of month, month, day of week; use interval_seconds for seconds",
        )
    try:
        CronSim(line, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise InvalidTimetable("cron", f"is not a cron line: {str(error).lower()}") from error


def _check_interval(interval: timedelta) -> None:
    if interval < SHORTEST_INTERVAL:
        raise InvalidTimetable("interval_seconds", "must be at least 1 second")
    if interval > LONGEST_INTERVAL:
        raise InvalidTimetable("interval_seconds", "must be at most ten years")


def _zone(name: str) -> ZoneInfo:
    try:
        # `localtime` is whatever the host happens to be set to, so replicas could disagree.
        return ZoneInfo(name if name != "localtime" else "")
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        near = difflib.get_close_matches(name, available_timezones(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; use an IANA name such as Europe/Berlin"
        raise InvalidTimetable("timezone", f"is not a known time zone{hint}") from error
