"""Waiting for something to become true, and failing with what was seen last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

AnswerT = TypeVar("AnswerT")

DEADLINE_SECONDS = 60.0
POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 0.2


def eventually(
    probe: Callable[[], AnswerT], *, seconds: float = DEADLINE_SECONDS, explain: Callable[[], str] | None = None
) -> AnswerT:
    """The first truthy answer of the probe; fails the test when there is none in time.

    Args:
        probe: Looks at a process from outside, where there is no signal to wait on.
        seconds: How long it may take.
        explain: What to show on failure instead of the last answer, such as the end of a log.
    """
    began_at = time.monotonic()
    while not (answer := probe()):
        waited_seconds = time.monotonic() - began_at
        if waited_seconds > seconds:
            pytest.fail(f"not within {seconds} s; {explain() if explain else f'last answer: {answer!r}'}")
        # Most probes connect to a server, which takes 5 ms of CPU from the process that is waited for.
        time.sleep(min(max(waited_seconds / 20, POLL_SECONDS), MAX_POLL_SECONDS))
    return answer
