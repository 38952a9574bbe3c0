"""What a service announces about itself, so that the gateway can accept its work without knowing its code."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, ConfigDict, Field, StringConstraints

from taskmesh.contracts._base import Part
from taskmesh.contracts.lifecycle import TaskKind


class TypeManifest(Part):
    """One task type of a service: for an event, the fact that the service listens to it."""

    model_config = ConfigDict(extra="ignore")

    type: str
    kind: TaskKind
    version: int = 1
    queue: str
    title: str = ""
    description: str = ""
    payload_schema: dict[str, Any]
    """JSON Schema 2020-12 of the payload."""
    max_attempts: int | None = None
    """None means without limit."""
    time_limit_seconds: float | None = None
    force_cancel: bool = False
    """True if a running task may be killed when it is cancelled."""


class ScheduleManifest(Part):
    """A schedule that the service's own code declares (Celery's `beat_schedule`)."""

    model_config = ConfigDict(extra="ignore")

    name: str
    type: str
    payload: dict[str, Any] = Field(default_factory=dict)
    cron: str | None = None
    interval_seconds: float | None = None
    timezone: str = "UTC"


class Manifest(Part):
    """Everything a service announces; the newest announcement replaces the one before."""

    model_config = ConfigDict(extra="ignore")

    service: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    release: str
    types: tuple[TypeManifest, ...]
    schedules: tuple[ScheduleManifest, ...] = ()
    announced_at: AwareDatetime
