"""What is submitted: tasks that do nothing, half a kibibyte each, one at a time or many together."""

from __future__ import annotations

import json
from typing import Any

from meshbench.load import SENT_AT, Load
from noop_service import DoNothing

BODY_BYTES = 512
BATCH = 500
CONNECTIONS = 64
BATCH_CONNECTIONS = 4


def single(*, body_bytes: int = BODY_BYTES) -> str:
    """The body that submits one task; the generator writes into it when it was due."""
    task: dict[str, Any] = {"type": DoNothing.type_name, "payload": {"name": "", "sent_at": 0}}
    missing = body_bytes - len(_text(task))
    task["payload"]["name"] = "x" * max(0, missing)
    return _text(task)


def batch(count: int = BATCH, *, body_bytes: int = BODY_BYTES) -> str:
    """The body that submits so many tasks in one request."""
    return f'{{"tasks":[{",".join([single(body_bytes=body_bytes)] * count)}]}}'


def one_by_one(port: int, headers: tuple[str, ...], *, seconds: float, rate: float | None = None) -> Load:
    """Single submissions to one server."""
    return Load(port=port, headers=headers, body=single(), connections=CONNECTIONS, seconds=seconds, rate=rate)


def in_batches(port: int, headers: tuple[str, ...], *, seconds: float) -> Load:
    """Submissions of 500 tasks each."""
    return Load(
        port=port,
        paths=("/v1/tasks:batchCreate",),
        headers=headers,
        body=batch(),
        connections=BATCH_CONNECTIONS,
        seconds=seconds,
    )


def _text(task: dict[str, Any]) -> str:
    # The time is a number of fixed width: the generator replaces it without looking at the rest.
    return json.dumps(task, separators=(",", ":")).replace('"sent_at":0', f'"sent_at":{SENT_AT.decode()}')
