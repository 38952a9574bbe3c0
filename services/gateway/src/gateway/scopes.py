"""What an API key may allow."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """One right of an API key."""

    TASKS_WRITE = "tasks:write"
    TASKS_READ = "tasks:read"
    TYPES_READ = "types:read"
    SCHEDULES_READ = "schedules:read"
    SCHEDULES_WRITE = "schedules:write"
