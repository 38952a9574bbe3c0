"""Soft time limits, which interrupt attempts and nothing else.

The pool raises `SoftTimeLimitExceeded` in whatever its process does at that moment. When the limit comes as a task
ends, that is the writing of its result: half of it is in the pipe, another message follows, and the main process, which
reads both as one, ends for a message that cannot be read.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from billiard.pool import soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded

_is_in_attempt = False


@contextmanager
def attempt() -> Iterator[None]:
    """Let a soft time limit interrupt the block; one that comes later is too late, and does nothing."""
    global _is_in_attempt  # noqa: PLW0603 - one attempt at a time is all that a process of the pool runs
    # The pool installs its own after its last hook; pools of threads have none.
    if signal.getsignal(signal.SIGUSR1) is soft_timeout_sighandler:
        signal.signal(signal.SIGUSR1, _interrupt)
    _is_in_attempt = True
    try:
        yield
    finally:
        _is_in_attempt = False


def _interrupt(*_: object) -> None:
    if _is_in_attempt:
        raise SoftTimeLimitExceeded
