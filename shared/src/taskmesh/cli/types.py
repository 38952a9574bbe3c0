"""`taskmesh types`: what work the mesh takes, and what each type wants to know."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from taskmesh.cli import output
from taskmesh.cli.tasks import AsJson, connect
from taskmesh.client import TaskType

DEEPEST = 8
ENUM_SHOWN = 8
PATTERN_SHOWN = 40
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length ≥ {}",
    "maxLength": "length ≤ {}",
    "minItems": "count ≥ {}",
    "maxItems": "count ≤ {}",
}


def types(
    type_name: Annotated[
        str | None, typer.Argument(metavar="[TYPE]", help="Show what this type wants to know.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the task types, or show one with its payload."""
    with connect() as mesh:
        if type_name is None:
            known = mesh.types()
            output.print_json(known) if as_json else _print_types(known)
        else:
            one = mesh.type(type_name)
            output.print_json(one) if as_json else _print_type(one)


def _print_types(known: tuple[TaskType, ...]) -> None:
    shown = output.table("TYPE", "SERVICE", "KIND", "VERSION", "WHAT IT DOES")
    for one in sorted(known, key=lambda each: each.type):
        summary = (one.title or one.description).partition("\n")[0]
        shown.add_row(one.type, one.service, one.kind.value, str(one.version), summary)
    output.show(shown)


def _print_type(one: TaskType) -> None:
    output.print_fields(
        [
            ("type", Text(one.type, style="bold")),
            ("what", inspect.cleandoc(f"{one.title}\n\n{one.description}")),
            ("service", one.service),
            ("kind", one.kind.value),
            ("version", one.version),
            ("attempts", one.max_attempts or "without limit"),
        ]
    )
    shown = output.table("FIELD", "TYPE", "NEEDED", "LIMITS AND MEANING")
    # Meanings may take several lines; names may not.
    shown.columns[-1].no_wrap = False
    shown.columns[-1].overflow = "fold"
    for path, kind, needed, meaning in fields(one.payload_schema):
        shown.add_row(path, kind, needed, meaning)
    hint = Text(f"Submit one: taskmesh submit {one.type} --payload @payload.json", style="dim")
    output.show(Group("", shown, "", hint))


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The fields of a JSON Schema as rows: path, type, whether it is needed, limits and meaning."""
    yield from _fields(schema, schema.get("$defs", {}), "", 0)


def _fields(
    node: dict[str, Any], definitions: dict[str, Any], prefix: str, depth: int
) -> Iterator[tuple[str, str, str, str]]:
    if depth > DEEPEST:
        return
    needed = set(node.get("required", ()))
    for name, raw in node.get("properties", {}).items():
        one, optional = _resolve(raw, definitions)
        path = prefix + name
        default = f"default {one['default']}" if one.get("default") not in (None, [], {}) else ""
        described = [_limits(one), default, str(one.get("description", "")).partition("\n")[0]]
        meaning = "; ".join(part for part in described if part)
        yield path, _kind(one, definitions) + ("?" if optional else ""), "yes" if name in needed else "", meaning
        items, _ = _resolve(one.get("items") or {}, definitions)
        yield from _fields(one, definitions, f"{path}.", depth + 1)
        yield from _fields(items, definitions, f"{path}[].", depth + 1)


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A schema without its reference, and without the null that makes it optional."""
    optional = False
    for _ in range(DEEPEST):
        choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
        if len(choices) == 1:
            optional = optional or len(node["anyOf"]) > 1
            node = {**choices[0], **{key: value for key, value in node.items() if key != "anyOf"}}
        elif "$ref" in node:
            target = definitions.get(str(node["$ref"]).rpartition("/")[2], {})
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        else:
            break
    return node, optional


def _kind(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    if len(node.get("enum", ())) in range(1, ENUM_SHOWN + 1):
        return " | ".join(str(value) for value in node["enum"])
    if "const" in node:
        return str(node["const"])
    if node.get("type") == "array":
        items, _ = _resolve(node.get("items") or {}, definitions)
        return f"array of {items.get('type', 'any')}"
    return str(node.get("format") or node.get("type") or "any")


def _limits(node: dict[str, Any]) -> str:
    said = [text.format(node[key]) for key, text in LIMITS.items() if key in node]
    choices = node.get("enum", ())
    if len(choices) > ENUM_SHOWN:
        named = ", ".join(str(value) for value in choices[:ENUM_SHOWN])
        said.append(f"one of {named} and {len(choices) - ENUM_SHOWN} more")
    items = node.get("items")
    for text, place in (("like {}", node), ("each like {}", items if isinstance(items, dict) else {})):
        pattern = str(place.get("pattern", ""))
        # A longer one explains nothing to a reader; --json has it.
        if 0 < len(pattern) <= PATTERN_SHOWN:
            said.append(text.format(pattern))
    return ", ".join(said)
