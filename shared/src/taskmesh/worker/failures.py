"""What the ledger may know of an error."""

from __future__ import annotations

import os
import traceback

from celery.exceptions import MaxRetriesExceededError, SoftTimeLimitExceeded
from pydantic import ValidationError

from taskmesh.contracts.lifecycle import TaskFailure
from taskmesh.errors import PermanentError, TaskmeshError


class Poison(PermanentError):
    """The task was started as often as it may be, and its worker was lost."""

    code = "poison"


def describe(error: BaseException) -> TaskFailure:
    """What the ledger may know of an error: our own words for our own errors, only the place for others."""
    if isinstance(error, TaskmeshError):
        return TaskFailure(code=error.code, message=_storable(str(error))[:2000], exception=qualified_name(error))
    if isinstance(error, SoftTimeLimitExceeded):
        return TaskFailure(
            code="time_limit", message="the soft time limit was exceeded", exception=qualified_name(error)
        )
    if isinstance(error, MaxRetriesExceededError):
        return TaskFailure(code="retries_exhausted", message="no retry is left", exception=qualified_name(error))
    # The text of a foreign exception often quotes the data that it choked on.
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""  # noqa: PTH119
    return TaskFailure(
        code="exception",
        message=f"{type(error).__name__}{place}; see the worker's log",
        exception=qualified_name(error),
    )


def describe_violation(error: ValidationError) -> str:
    """What is wrong and where, without the value: it may be personal."""
    places = [f"/{'/'.join(str(part) for part in item['loc'])}: {item['type']}" for item in error.errors()[:10]]
    return "; ".join(places)


def _storable(text: str) -> str:
    """The text without what PostgreSQL cannot keep: U+0000, and halves of surrogate pairs."""
    return text.replace("\x00", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def qualified_name(error: BaseException) -> str:
    """`module.Class` of an exception."""
    return f"{type(error).__module__}.{type(error).__qualname__}"
