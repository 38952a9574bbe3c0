"""What people type, as values: payloads, fields, moments and lengths of time."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from taskmesh.cli.failures import UsageError

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def payload(text: str | None, fields: list[str]) -> dict[str, Any]:
    """The payload that `--payload` (JSON, `@file` or `-`) and `--set` describe together."""
    content: Any = {} if text is None else _json(_read(text), "the payload")
    if not isinstance(content, dict):
        raise UsageError("the payload must be a JSON object")
    for field in fields:
        _set(content, field)
    return content


def duration(text: str) -> timedelta:
    """`90`, `90s`, `1.5h`, `2d`, or several together: `1h 30m`."""
    parts = [(match[1], match[2]) for match in DURATION.finditer(text)]
    if not parts or DURATION.sub("", text).strip():
        raise UsageError(f"{text!r} is no length of time; write 90s, 5m, 2h or 1d")
    return timedelta(seconds=sum(float(number) * UNIT_SECONDS[unit or "s"] for number, unit in parts))


def moment(text: str) -> datetime:
    """An ISO 8601 date and time; without a zone it is this machine's."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UsageError(f"{text!r} is no moment; write 2026-12-24T18:00 or 2026-12-24T18:00Z") from None


def moment_or_duration(text: str) -> datetime:
    """A moment, or a length of time from now."""
    return datetime.now(UTC) + duration(text) if DURATION.match(text) and "-" not in text else moment(text)


def _read(text: str) -> str:
    if text == "-":
        return sys.stdin.read()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text[1:]} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "" if text.lstrip().startswith(("{", "[")) else "; a file is given as @file"
        raise UsageError(
            f"{what} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}{hint}"
        ) from error


def _set(content: dict[str, Any], field: str) -> None:
    """Carry out `buyer.name=Ada` (a text) or `lines.0.tax:={"rate": "19"}` (JSON)."""
    path, separator, text = field.partition("=")
    if not separator or not path.rstrip(":"):
        raise UsageError(f"--set {field}: write name=text, or name:=json")
    value: Any = _json(text, f"--set {path.rstrip(':')}") if path.endswith(":") else text
    names = path.removesuffix(":").split(".")
    place: Any = content
    try:
        for name, following in pairwise(names):
            empty: Any = [] if following.isdecimal() else {}
            place = _enter(place, name, empty)
        _enter(place, names[-1], None, value)
    except (IndexError, TypeError, ValueError):
        raise UsageError(f"--set {path.removesuffix(':')}: there is no such place in the payload") from None


def _enter(place: Any, name: str, empty: Any, value: Any = ...) -> Any:
    """The thing of that name, made when there is none; `value` replaces it."""
    if isinstance(place, list):
        index = int(name)
        if index == len(place):
            place.append(empty)
        if value is not ...:
            place[index] = value
        return place[index]
    if not isinstance(place, dict):
        raise TypeError(name)
    if value is not ...:
        place[name] = value
    return place.setdefault(name, empty)
