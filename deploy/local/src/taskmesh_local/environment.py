"""What each process of the mesh is told, and the file that a shell can source."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from taskmesh.parts import records

# The company that issues the invoices of a local mesh; a variable of the same name in the caller's shell wins.
SELLER = {
    "TASKMESH_SELLER_NAME": "Taskmesh Demo GmbH",
    "TASKMESH_SELLER_ADDRESS": "Am Kanal 7|10179 Berlin|Germany",
    "TASKMESH_SELLER_VAT_ID": "DE811128135",
    "TASKMESH_SELLER_IBAN": "DE02120300000000202051",
    "TASKMESH_SELLER_EMAIL": "billing@taskmesh.example",
}
DEFAULTS = SELLER | {
    "TASKMESH_LOG_FORMAT": "console",
    "TASKMESH_LOG_LEVEL": "INFO",
    "TASKMESH_WORKER_CONCURRENCY": "2",
    "TASKMESH_MAIL_DOMAIN": "taskmesh.example",
    "TASKMESH_MAIL_FROM": "Taskmesh Demo <billing@taskmesh.example>",
    # The inbox answers at once or not at all: a mail whose fate is unknown need not rest for RFC 5321's ten minutes.
    "TASKMESH_SMTP_ANSWER_SECONDS": "10",
    "TASKMESH_RESEND_AFTER_SECONDS": "10",
}


def of_process(variables: Mapping[str, str], *, mesh_file: Path) -> dict[str, str]:
    """The environment of a process: the caller's, our defaults, and `variables`, the last of which cannot be overruled.

    What `.taskmesh/env` exports is left out: it is for people, and its URLs are elevated ones.
    """
    exported = {*read(mesh_file), *FILE_NAMES}
    kept = {name: value for name, value in os.environ.items() if name not in exported and not name.startswith("OTEL_")}
    return DEFAULTS | kept | {"PYTHONUNBUFFERED": "1"} | dict(variables)


def digest(variables: Mapping[str, str]) -> str:
    """Changes when a process would have to be started again to learn its new environment."""
    return hashlib.sha256(json.dumps(dict(variables), sort_keys=True).encode()).hexdigest()


FILE_NAMES = (
    "TASKMESH_URL",
    "TASKMESH_API_KEY",
    "TASKMESH_INBOX_URL",
    "TASKMESH_TRACES_URL",
    "TASKMESH_AMQP_URL",
    "TASKMESH_LOCAL_AMQP_URL",
    "TASKMESH_MANAGEMENT_URL",
    "TASKMESH_LOCAL_MANAGEMENT_URL",
    "TASKMESH_DATABASE_URL",
)
"""Never handed to a process unless set for it on purpose, even by a shell that has sourced another mesh's file."""


def write(path: Path, variables: Mapping[str, str]) -> None:
    """Write a file that a shell can source; only its owner may read it."""
    lines = ["# Made by `make up`. Use it with:  . .taskmesh/env", ""]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    records.write_private(path, "\n".join(lines) + "\n")


def read(path: Path) -> dict[str, str]:
    """The variables of a file that `write` made; none if there is no file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return {name: value for word in words if len(word) == 2 for name, _, value in [word[1].partition("=")]}
