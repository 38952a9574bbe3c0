"""Payloads that fit a contract, made from its JSON Schema."""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Mapping
from typing import Any

from taskmesh.contracts._base import Contract

Schema = Mapping[str, Any]

# What a pattern may want, the most general first; a schema with another wish gives an example, or the test the field.
_CANDIDATES = ("a", "abc", "1", "19", "A", "DE", "en", "EUR", "a.b", "a@example.com", "1.00", "00:00", "0" * 64)
_FORMATS = {
    "email": "someone@example.com",
    "date": "2026-01-31",
    "time": "12:00:00Z",
    "date-time": "2026-01-31T12:00:00Z",
    "duration": "P1D",
    "uri": "https://example.com/",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
}


class PayloadFactory:
    """Makes payloads: `payload_factory(IssueInvoice, currency="JPY")`, or from a manifest's JSON Schema."""

    def __call__(self, contract: type[Contract] | Schema, /, **fields: Any) -> dict[str, Any]:
        """A payload with the required fields (or the schema's first example), and `fields` replaced or added.

        Raises:
            pydantic.ValidationError: A contract was given and the replaced fields do not fit it.
            ValueError: A pattern is beyond what this factory can meet; give that field yourself.
        """
        if isinstance(contract, type):
            payload: dict[str, Any] = self.from_schema(contract.model_json_schema(), **fields)
            contract.model_validate(payload)
            return payload
        return self.from_schema(contract, **fields)

    def from_schema(self, schema: Schema, **fields: Any) -> dict[str, Any]:
        """The same for a JSON Schema, unvalidated."""
        if examples := schema.get("examples"):
            example: dict[str, Any] = copy.deepcopy(examples[0])
            return example | fields
        without = {**schema, "required": [name for name in schema.get("required", ()) if name not in fields]}
        value: dict[str, Any] = _value(without, schema.get("$defs", {}))
        return value | fields


def _value(schema: Schema, definitions: Schema) -> Any:  # noqa: C901, PLR0911, PLR0912 - one flat list; whatever JSON value the schema asks for.
    if "$ref" in schema:
        return _value(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "examples"):
        if schema.get(key):
            return copy.deepcopy(schema[key][0])
    if "default" in schema:
        return copy.deepcopy(schema["default"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and "properties" not in schema:
            return _value(schema[key][0], definitions)
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            properties = schema.get("properties", {})
            return {name: _value(properties[name], definitions) for name in schema.get("required", ())}
        case "array":
            items = schema.get("prefixItems") or [schema.get("items", {"type": "string"})] * schema.get("minItems", 0)
            return [_value(item, definitions) for item in items]
        case "string":
            return _text(schema)
        case "integer":
            return int(_number(schema, step=1))
        case "number":
            return _number(schema, step=0.5)
        case "boolean":
            return True
        case _:
            return None


def _text(schema: Schema) -> str:
    if schema.get("format") == "uuid":
        return str(uuid.uuid4())
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", 1000)
    pattern = schema.get("pattern", "")
    wanted = (_FORMATS.get(schema.get("format", "")), *_CANDIDATES, "a" * max(shortest, 1))
    for text in wanted:
        if text is not None and shortest <= len(text) <= longest and re.search(pattern, text):
            return text
    raise ValueError(f"no text at hand matches {pattern!r} with {shortest} to {longest} characters: give the field")


def _number(schema: Mapping[str, float], *, step: float) -> float:
    if "minimum" in schema:
        return max(schema["minimum"], min(1, schema.get("maximum", 1)))
    if "exclusiveMinimum" in schema:
        return schema["exclusiveMinimum"] + step
    return min(1, schema.get("maximum", 1), schema.get("exclusiveMaximum", 2) - step)
