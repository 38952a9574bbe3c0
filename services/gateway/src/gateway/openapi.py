"""The OpenAPI document, which knows every task type that is announced at the moment."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.catalogue import KnownType, Snapshot
from gateway.problems import KINDS, ProblemDocument, declare
from gateway.samples import sample

TITLE: Final = "Taskmesh gateway"
DESCRIPTION: Final = """
Hand work over and be sure that it is done: `202 Accepted` means committed to disk.

The task types below are those that workers announce right now; a new worker appears here without a release of the
gateway. Every error is an RFC 9457 problem document, explained at `/problems/{code}`.
"""
SUBMISSION: Final = "TaskSubmission"


class LiveOpenApi:
    """Builds the document, and builds it again when the catalogue has changed."""

    def __init__(self, app: FastAPI, version: str) -> None:
        self._app = app
        self._version = version
        self._routes: dict[str, Any] | None = None
        self._built_for: Mapping[str, Any] | None = None
        self._document = b""

    def build(self, snapshot: Snapshot) -> bytes:
        """The document for what is announced, as JSON."""
        if self._routes is None:
            self._routes = self._base()
        if self._built_for != snapshot.version:
            self._document = json.dumps(_with_types(self._routes, snapshot), ensure_ascii=False).encode()
            self._built_for = snapshot.version
        return self._document

    def _base(self) -> dict[str, Any]:
        document = get_openapi(title=TITLE, version=self._version, description=DESCRIPTION, routes=self._app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs", {}))
        problem["properties"]["code"]["enum"] = sorted(KINDS)
        schemas["ProblemDocument"] = problem
        for operations in document["paths"].values():
            for operation in operations.values():
                if "requestBody" in operation:
                    operation["responses"]["400"] = {**declare("invalid_request")[422], "description": "Not JSON"}
                # FastAPI declares its own form of a validation error, which this application never answers with.
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    operation["responses"]["422"] = declare("invalid_request")[422]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        return document


def _with_types(base: Mapping[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(dict(base))
    if not snapshot.commands:
        return document
    schemas: dict[str, Any] = document["components"]["schemas"]
    options: list[dict[str, Any]] = []
    mapping: dict[str, str] = {}
    for name, known in sorted(snapshot.commands.items()):
        schemas.update(_components(known))
        submission = f"{SUBMISSION}.{name}"
        schemas[submission] = _submission_of(schemas[SUBMISSION], known)
        mapping[name] = f"#/components/schemas/{submission}"
        options.append({"$ref": mapping[name]})
    body = document["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]
    body["schema"] = {
        "oneOf": options,
        "discriminator": {"propertyName": "type", "mapping": mapping},
        "title": "A task of one of the announced types",
    }
    body["examples"] = {
        name: {
            "summary": known.manifest.title or name,
            "value": {"type": name, "payload": sample(known.manifest.payload_schema)},
        }
        for name, known in sorted(snapshot.commands.items())
    }
    return document


def _components(known: KnownType) -> dict[str, Any]:
    """The payload's schema as a component of the type's name, and each of its definitions as `<type>.<name>`."""
    schema = copy.deepcopy(known.manifest.payload_schema)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    schema.pop("$schema", None)
    schema.setdefault("title", known.manifest.title or known.type)
    if known.manifest.description:
        schema.setdefault("description", known.manifest.description)
    found = {known.type: _moved(schema, known.type)}
    for name, definition in definitions.items():
        found[f"{known.type}.{name}"] = _moved(definition, known.type)
    return found


def _moved(schema: Any, type_name: str) -> Any:
    """The schema with its references pointing at the components."""
    if isinstance(schema, dict):
        moved = {name: _moved(value, type_name) for name, value in schema.items()}
        if isinstance(schema.get("$ref"), str):
            moved["$ref"] = _reference(schema["$ref"], type_name)
        return moved
    if isinstance(schema, list):
        return [_moved(item, type_name) for item in schema]
    return schema


def _reference(reference: str, type_name: str) -> str:
    component = f"#/components/schemas/{type_name}"
    if reference.startswith("#/$defs/"):
        return f"{component}.{reference.removeprefix('#/$defs/')}"
    return component + reference.removeprefix("#")


def _submission_of(generic: Mapping[str, Any], known: KnownType) -> dict[str, Any]:
    submission = copy.deepcopy(dict(generic))
    submission["title"] = known.manifest.title or known.type
    submission["description"] = known.manifest.description or f"Ask {known.service} for {known.type}."
    submission["properties"]["type"] = {"const": known.type, "type": "string"}
    submission["properties"]["payload"] = {"$ref": f"#/components/schemas/{known.type}"}
    return submission
