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
    SERVICES_READ = "services:read"
    SERVICES_WRITE = "services:write"
    DEAD_LETTERS_READ = "dead-letters:read"
    DEAD_LETTERS_WRITE = "dead-letters:write"
    RECONCILIATION_READ = "reconciliation:read"
    RECONCILIATION_WRITE = "reconciliation:write"
