"""What goes into a task, and what comes out of it, in the forms that the mesh can carry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from taskmesh import lifecycle
from taskmesh.errors import ContractViolation

RESULT_MAX_BYTES = 64 * 1024

PAYLOAD_MAX_BYTES = 128 * 1024
"""What the gateway takes of a caller."""

# After an even number of backslashes, which are escaped ones.
NULL_CHARACTER = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def celery_payload(args: tuple[Any, ...] | list[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The contract's fields, given as keyword arguments or as one positional mapping, as plain Celery may do.

    Raises:
        ContractViolation: They come in some other form.
    """
    if not args:
        return kwargs
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        return cast("Mapping[str, Any]", args[0])
    raise ContractViolation("send the contract's fields as keyword arguments, or as one positional mapping")


def plain(value: Any) -> Any:
    """The JSON form of what a task returned."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def bounded(value: Any, max_bytes: int = RESULT_MAX_BYTES) -> Any:
    """The value, if it is JSON and small enough for the ledger.

    Raises:
        ValueError: The ledger could not keep it, or it is too large: then return a reference into the object store.
        TypeError: It is not JSON.
    """
    encoded = lifecycle.json_bytes(value)
    if NULL_CHARACTER.search(encoded):
        raise ValueError("result with the character U+0000, which PostgreSQL cannot keep")
    size = len(encoded)
    if size > max_bytes:
        raise ValueError(f"result of {size} bytes; at most {max_bytes}, return a reference instead")
    return value
