"""What a caller can ask of schedules, as operations without I/O (exchange.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict
from urllib.parse import quote
from uuid import UUID

from taskmesh.client.exchange import Operation, Patience, Request, call
from taskmesh.client.operations import content_of, instant, key_header
from taskmesh.client.paging import emit_pages
from taskmesh.client.results import Schedule, SchedulePage
from taskmesh.contracts import Command


class ScheduleOptions(TypedDict, total=False):
    """When a schedule fires, and how."""

    cron: str | None
    """Five fields; either this or `interval_seconds`."""
    interval_seconds: float | None
    timezone: str
    """IANA name, such as `Europe/Berlin`, for `cron`."""
    misfire: Literal["skip", "once", "all"]
    """What becomes of fires that were missed while no scheduler ran: left out, made up by one, or each made up."""
    misfire_window_seconds: float
    """With `all`: older fires than this are left out."""
    overlap: Literal["allow", "skip"]
    """Whether to fire while the last run is still going."""
    starts_at: datetime | None
    ends_at: datetime | None
    priority: int | None
    tags: Sequence[str]


class NewSchedule(ScheduleOptions, total=False):
    """What a new schedule can be given beside its name, type and payload."""

    paused: bool


class ScheduleChanges(ScheduleOptions, total=False):
    """What a schedule can be changed in; what is left out stays."""

    name: str
    payload: Mapping[str, Any]


def create(
    name: str,
    task: str | Command,
    payload: Mapping[str, Any] | None,
    options: NewSchedule,
    patience: Patience,
) -> Operation[Schedule]:
    """Store a schedule under its name, once however often the request has to be sent."""
    type_name, content = content_of(task, payload)
    request = Request(
        method="POST",
        path="/v1/schedules",
        headers=key_header(None),
        body={"name": name, "type": type_name, "payload": dict(content), **_json(options)},
        repeatable=True,
    )
    return (yield from _one(request, patience))


def list_schedules(page_size: int, patience: Patience) -> Operation[None]:
    """Emit every schedule that this API key may see."""
    yield from emit_pages("/v1/schedules", (), SchedulePage, limit=None, page_size=page_size, patience=patience)


def get(schedule_id: UUID | str, patience: Patience) -> Operation[Schedule]:
    """The schedule as it is now."""
    return (yield from _one(Request(method="GET", path=_path(schedule_id), repeatable=True), patience))


def update(schedule_id: UUID | str, changes: ScheduleChanges, patience: Patience) -> Operation[Schedule]:
    """Change a schedule. The same change twice is the same as once, so it is safe to repeat."""
    request = Request(method="PATCH", path=_path(schedule_id), body=_json(changes), repeatable=True)
    return (yield from _one(request, patience))


def pause(schedule_id: UUID | str, patience: Patience) -> Operation[Schedule]:
    """Fire no more until resumed."""
    return (yield from _one(Request(method="POST", path=f"{_path(schedule_id)}:pause", repeatable=True), patience))


def resume(schedule_id: UUID | str, patience: Patience) -> Operation[Schedule]:
    """Fire again."""
    return (yield from _one(Request(method="POST", path=f"{_path(schedule_id)}:resume", repeatable=True), patience))


def delete(schedule_id: UUID | str, patience: Patience) -> Operation[None]:
    """Fire never again; tasks that it has submitted stay. Sent once: a second time, there would be no such schedule."""
    yield from call(Request(method="DELETE", path=_path(schedule_id), repeatable=False), patience)


def _one(request: Request, patience: Patience) -> Operation[Schedule]:
    answer = yield from call(request, patience)
    return Schedule.model_validate_json(answer.body)


def _path(schedule_id: UUID | str) -> str:
    return f"/v1/schedules/{quote(str(schedule_id), safe='')}"


def _json(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: instant(value) if isinstance(value, datetime) else value for name, value in fields.items()}
