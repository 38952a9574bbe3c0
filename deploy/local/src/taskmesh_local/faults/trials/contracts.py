"""What the trial worker understands; every command may be submitted by anyone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taskmesh.contracts import Command, Event

Milliseconds = Annotated[int, Field(ge=0, le=60_000)]


class Record(Command, type="trials.effect.record"):
    """Leaves its effect, after some work."""

    work_ms: Milliseconds = 0


class Follow(Command, type="trials.effect.follow"):
    """Leaves its effect, and sends commands, and an event if told to."""

    commands: Annotated[int, Field(ge=0, le=10)] = 1
    emit: bool = False


class Steps(Command, type="trials.effect.steps"):
    """Commits a step before its effect, as a task does that calls others."""

    work_ms: Milliseconds = 0


class Stumble(Command, type="trials.effect.stumble"):
    """Ends badly in its first runs, then leaves its effect."""

    way: Literal["error", "crash", "hang", "stuck"]
    """Raises a TransientError, kills its process, exceeds its soft limit, or its hard one."""
    runs: Annotated[int, Field(ge=1, le=3)] = 1


class Refuse(Command, type="trials.effect.refuse"):
    """Writes its effect and fails for good, so that nothing of it may stay."""


class Poison(Command, type="trials.effect.poison"):
    """Kills its process whenever it runs."""


class Recorded(Event, type="trials.effect.recorded"):
    """An effect was left by a command that was told to tell."""
