"""Waiting for something to become true, and failing with what was seen last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

AnswerT = TypeVar("AnswerT")

DEADLINE_SECONDS = 60.0
POLL_SECONDS = 0.02


def eventually(
    probe: Callable[[], AnswerT], *, seconds: float = DEADLINE_SECONDS, explain: Callable[[], str] | None = None
) -> AnswerT:
    """The first truthy answer of the probe; fails the test when there is none in time.

    Args:
        probe: Looks at a process from outside, where there is no signal to wait on.
        seconds: How long it may take.
        explain: What to show on failure instead of the last answer, such as the end of a log.
    """
    end = time.monotonic() + seconds
    while not (answer := probe()):
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds} s; {explain() if explain else f'last answer: {answer!r}'}")
        time.sleep(POLL_SECONDS)
    return answer
