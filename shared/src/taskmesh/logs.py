"""Structured logs: one JSON object a line in containers, readable lines on a terminal.

Callers write `logger.info("task succeeded", extra={"task_id": ...})`: a constant message, and facts that are ids.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

from opentelemetry import trace

_facts: ContextVar[dict[str, Any] | None] = ContextVar("taskmesh_log_facts", default=None)

# Every attribute that the logging module itself sets: what is left over came in through `extra`.
_BUILT_IN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "data",
}


# https://www.w3.org/TR/trace-context/#traceparent-header-field-values; a later version may add fields.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-|$)")

IDS_LOGGED = 20
"""A line about more tasks than that names the first of them."""


@contextmanager
def facts(**values: Any) -> Iterator[None]:
    """Add facts, such as the task's id, to every line logged in the block."""
    token = _facts.set({**(_facts.get() or {}), **values})
    try:
        yield
    finally:
        _facts.reset(token)


def of_task(
    task_id: object,
    type_name: str | None,
    attempt: int | None,
    *,
    trace_id: str | None = None,
    traceparent: str | None = None,
) -> dict[str, Any]:
    """The facts that every line about one task has; what is not known is left out.

    Args:
        attempt: As the ledger counts: 0 before the first one has begun.
        trace_id: The task's own trace, or None if a `traceparent` names it. Without either, the line has that of the
            current span, which is right where the task is run.
    """
    trace_id = trace_id or trace_id_of(traceparent)
    known = {"task_id": task_id and str(task_id), "type": type_name, "attempt": attempt, "trace_id": trace_id}
    return {name: value for name, value in known.items() if value is not None}


def of_tasks(task_ids: Iterable[object]) -> dict[str, Any]:
    """The facts of a line about many tasks: the first of their ids."""
    return {"task_ids": [str(task_id) for task_id in islice(task_ids, IDS_LOGGED)]}


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id inside a W3C traceparent."""
    found = _TRACEPARENT.match(traceparent or "")
    return found[1] if found else None


def configure(log_format: Literal["json", "console"], level: str, service: str, role: str) -> None:
    """Send this process's logs to standard output in the given format, in place of any handler set before.

    Records tell no file, thread or process any more, to anybody's handlers.
    """
    handler = logging.StreamHandler(sys.stdout)
    formatter: logging.Formatter = JsonFormatter(service, role) if log_format == "json" else ConsoleFormatter(role)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # What no line of ours says need not be found out for each: the caller's file, its thread and its process.
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None  # noqa: SLF001 - the documented way
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # Libraries warn on standard error, in lines of their own form.
    logging.captureWarnings(capture=True)
    for name, least in QUIET.items():
        logging.getLogger(name).setLevel(max(least, root.level))


# Libraries whose INFO is about themselves. Celery's trace logger would print results and arguments.
QUIET = {
    # Its errors hold addresses and come with every attempt; ours say once that the broker is away.
    "pika": logging.CRITICAL,
    "httpx": logging.WARNING,
    "celery.app.trace": logging.CRITICAL,
    "celery.worker.strategy": logging.WARNING,
    # Its errors quote exceptions; `taskmesh.worker.consumer` says what has happened.
    "celery.worker.request": logging.CRITICAL,
    "celery.redirected": logging.WARNING,
    "alembic": logging.WARNING,
    "opentelemetry": logging.ERROR,
    # It tells of every batch, and of where it was to go; `taskmesh.exporting` says once a minute what that comes to.
    "opentelemetry.exporter.otlp": logging.CRITICAL,
}


def _collect(record: logging.LogRecord) -> dict[str, Any]:
    values: dict[str, Any] = dict(_facts.get() or {})
    values.update({key: value for key, value in record.__dict__.items() if key not in _BUILT_IN})
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        current = trace.format_trace_id(span.trace_id)
        if values.setdefault("trace_id", current) != current:
            # Of the request or the batch that has to do with the task.
            values["current_trace_id"] = current
    return values


_encode = json.JSONEncoder(default=str, ensure_ascii=False).encode


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, service, role, then the facts."""

    def __init__(self, service: str, role: str) -> None:
        super().__init__()
        self._origin = {"service": service, "role": role}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._origin,
            **_collect(record),
        }
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__qualname__
            line["stack"] = stack(record.exc_info[1])
        return _encode(line)


class ConsoleFormatter(logging.Formatter):
    """`12:00:01.234 INFO  worker  message  key=value`, for people."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        values = " ".join(f"{key}={_shown(value)}" for key, value in _collect(record).items() if value is not None)
        line = f"{at} {record.levelname:<7} {self._role:<9} {record.getMessage()}"
        if values:
            line += f"  {values}"
        if record.exc_info and record.exc_info[0]:
            line += f"\n{record.exc_info[0].__qualname__}\n{stack(record.exc_info[1])}"
        return line


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def stack(error: BaseException | None) -> str:
    """Where an error happened, without its text: texts of drivers and validators quote the data they choked on."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
