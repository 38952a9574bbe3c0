"""What is to be verified, and how: from the command line, and from the service's own `verify` folder."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "verify"
ENVIRONMENT_FILE = "environment"
PREPARE_FILE = "prepare.py"


class PlanMistake(Exception):
    """What was asked for cannot be understood; the text says what to write instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One verification.

    Attributes:
        package: What `python -m` runs.
        environment: What the service is told beyond where its database, broker, mail relay and object store are.
        payloads: By type; other types get one made from their schema.
        only: The types to verify; none means all.
        skip: Types to leave out.
        ignore: Effects that are not compared, such as `table orders`, `table orders.touched_at` or `mails`.
        probes: Shell commands whose output is an effect.
        prepare: Commands run once, after the service's setup: they fill what the tasks need.
        timeout_seconds: How long one delivery may take until it is settled, its retries included.
    """

    service: str
    package: str
    environment: Mapping[str, str] = field(default_factory=dict)
    payloads: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    only: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()
    probes: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    timeout_seconds: float = 60.0


def folder_of(package: str) -> Path | None:
    """The folder `verify` inside of the package, found without importing the package; None if there is none."""
    inside = Path(*package.split("."), FOLDER)
    folders = (Path(entry) / inside for entry in (".", *sys.path))
    return next((folder for folder in folders if folder.is_dir()), None)


def folder_environment(folder: Path | None) -> dict[str, str]:
    """The variables in the folder's `environment`."""
    path = folder / ENVIRONMENT_FILE if folder else None
    return read_environment(path) if path and path.exists() else {}


def folder_payloads(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The payloads in the folder: `<type>.json` each."""
    files = sorted(folder.glob("*.json")) if folder else []
    return {path.name.removesuffix(".json"): read_payload(path) for path in files}


def folder_prepare(folder: Path | None) -> tuple[str, ...]:
    """The command that runs the folder's `prepare.py`."""
    path = folder / PREPARE_FILE if folder else None
    return (shlex.join([sys.executable, str(path)]),) if path and path.exists() else ()


def read_environment(path: Path) -> dict[str, str]:
    """The variables of a file of `KEY=VALUE` lines; a value may be quoted as in a shell.

    Raises:
        PlanMistake: It cannot be read.
    """
    try:
        words = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise PlanMistake(f"{path} cannot be read: {error}") from error
    return variables(" ".join(word).removeprefix("export ") for word in words if word)


def variables(assignments: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` each; `KEY` alone is taken from the caller's own environment.

    Raises:
        PlanMistake: A variable that is to be taken over is not set.
    """
    found: dict[str, str] = {}
    for assignment in assignments:
        name, given, value = assignment.partition("=")
        if not given and name not in os.environ:
            raise PlanMistake(f"{name} is not set here: write {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def payload_files(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`TYPE=FILE` each.

    Raises:
        PlanMistake: One is written otherwise, or its file holds no JSON object.
    """
    found: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, given, path = assignment.partition("=")
        if not given:
            raise PlanMistake(f"{assignment}: write --payload TYPE=FILE.json")
        found[name] = read_payload(Path(path))
    return found


def read_payload(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        PlanMistake: There is none.
    """
    try:
        payload = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanMistake(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(payload, dict):
        raise PlanMistake(f"{path}: a payload is a JSON object")
    return payload
