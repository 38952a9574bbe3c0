"""Celery's `beat_schedule` syntax, announced to the gateway, whose schedulers run it.

Beat itself is a single point of failure and loses fires; here it never runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from celery.schedules import crontab, schedule

from taskmesh.contracts.manifest import ScheduleManifest


def announced_schedules(beat_schedule: Mapping[str, Mapping[str, Any]], timezone: Any) -> tuple[ScheduleManifest, ...]:
    """The manifest's form of `app.conf.beat_schedule`.

    Raises:
        ValueError: An entry's schedule is neither an interval nor a crontab, or has positional arguments.
    """
    return tuple(_announced(name, entry, str(timezone or "UTC")) for name, entry in beat_schedule.items())


def _announced(name: str, entry: Mapping[str, Any], timezone: str) -> ScheduleManifest:
    if entry.get("args"):
        raise ValueError(f"beat_schedule {name!r}: give `kwargs`, the fields of the contract, and not `args`")
    when = entry["schedule"]
    cron, interval_seconds = _timing(name, when)
    return ScheduleManifest(
        name=name,
        type=entry["task"],
        payload=dict(entry.get("kwargs") or {}),
        cron=cron,
        interval_seconds=interval_seconds,
        timezone=timezone,
    )


def _timing(name: str, when: Any) -> tuple[str | None, float | None]:
    if isinstance(when, crontab):
        fields = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")
        return " ".join(str(getattr(when, f"_orig_{field}")).replace(" ", "") for field in fields), None
    if isinstance(when, schedule):
        return None, when.run_every.total_seconds()
    if isinstance(when, timedelta):
        return None, when.total_seconds()
    if isinstance(when, int | float):
        return None, float(when)
    raise ValueError(f"beat_schedule {name!r}: {type(when).__name__} cannot be announced; use crontab or an interval")
