"""A value to begin from, made from a JSON Schema: required fields filled in, patterns left to the reader."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

_DEEPEST: Final = 8

_STRINGS: Final = {
    "uuid": "0198c0de-0000-7000-8000-000000000000",
    "date": "2026-11-22",
    "date-time": "2026-11-22T12:00:00Z",
    "email": "ada@example.com",
    "uri": "https://example.com/",
}
_SIMPLE: Final[Mapping[str, Any]] = {"integer": 1, "number": 1, "boolean": False, "null": None}


def sample(schema: Mapping[str, Any]) -> Any:
    """The schema's own first example, or a value of its shape."""
    return _sample(schema, schema.get("$defs", {}), 0)


def _sample(schema: Any, definitions: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return None
    if "$ref" in schema:
        return _sample(definitions.get(schema["$ref"].removeprefix("#/$defs/")), definitions, depth + 1)
    found, value = _given(schema)
    if found:
        return value
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return _sample(schema[choice][0], definitions, depth + 1)
    return _shaped(schema, definitions, depth)


def _given(schema: Mapping[str, Any]) -> tuple[bool, Any]:
    for name in ("examples", "enum"):
        if schema.get(name):
            return True, copy.deepcopy(schema[name][0])
    for name in ("default", "const"):
        if name in schema:
            return True, copy.deepcopy(schema[name])
    return False, None


def _shaped(schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int) -> Any:
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _sample(properties.get(name), definitions, depth + 1) for name in schema.get("required", ())}
        case "array":
            return [_sample(schema.get("items"), definitions, depth + 1)] if schema.get("minItems") else []
        case "string":
            return _STRINGS.get(schema.get("format", ""), "text")
        case kind:
            return _SIMPLE.get(str(kind))
