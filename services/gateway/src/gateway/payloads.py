"""Holding a payload against its JSON Schema, and saying what is wrong without repeating what was sent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Final

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012
from rfc3986_validator import validate_rfc3986

from gateway.problems import MAX_ERRORS, FieldError, pointer

MAX_BITS: Final = 1024
"""Integers beyond a double's range overflow the arithmetic of validators, ours and those of whoever reads them next."""
MAX_NAME: Final = 100
"""Longer names of fields are cut where an answer repeats them."""

# JSON Schema takes 1.0 for an integer; the workers' models do not, and would refuse what was accepted here.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
)
# `$` is the end of the text; to Python's `re` also what comes before a last newline, which no worker accepts.
_DOLLAR = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<dollar>\$)", re.DOTALL)


@lru_cache(maxsize=1000)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(_DOLLAR.sub(lambda found: r"\Z" if found["dollar"] else found[0], pattern))


def _check_pattern(validator: Any, pattern: str, value: Any, _: object) -> Iterator[ValidationError]:
    if validator.is_type(value, "string") and not _compiled(pattern).search(value):
        yield ValidationError("does not match")


_Validator = extend(Draft202012Validator, validators={"pattern": _check_pattern}, type_checker=_TYPES)
_FORMATS = FormatChecker()

# RFC 3987, 2.2: what an IRI may have beyond a URI, and what it may have in its query besides.
_UCSCHAR = re.compile(
    "[\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef"
    + "".join(f"{chr(plane << 16)}-{chr((plane << 16) + 0xFFFD)}" for plane in range(1, 14))
    + "\U000e1000-\U000efffd]"
)
_IPRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")


def _iri_as_uri(iri: str) -> str:
    """A URI that is well-formed exactly if the IRI is: one escape stands for each character that URIs do not have."""
    rest, hash_, fragment = iri.partition("#")
    path, mark, query = rest.partition("?")
    return _UCSCHAR.sub("%AA", path + mark + _IPRIVATE.sub("%AA", query) + hash_ + fragment)


def _is_iri(value: object, rule: str = "URI") -> bool:
    if not isinstance(value, str):
        return True
    # To the validator, too, the end is what comes before a last newline.
    return not value.endswith("\n") and validate_rfc3986(_iri_as_uri(value), rule) is not None


# jsonschema's own checks take a package that compiles 38 grammars when it is imported: 0.8 s of the start of a process.
_FORMATS.checks("iri")(_is_iri)
_FORMATS.checks("iri-reference")(partial(_is_iri, rule="URI_reference"))


class UnusableSchema(ValueError):
    """The schema is none, or refers to something outside itself."""


class PayloadValidator:
    """A compiled JSON Schema (2020-12, formats checked).

    Raises:
        UnusableSchema: See there.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            _Validator.check_schema(schema)
        except SchemaError as error:
            raise UnusableSchema(f"not a JSON Schema: {'/'.join(map(str, error.absolute_path))}") from error
        resolver = Registry().with_resource("", DRAFT202012.create_resource(dict(schema))).resolver()
        for reference in _references(schema):
            if not reference.startswith("#"):
                # Resolving it would mean a network call with an address of the announcer's choice.
                raise UnusableSchema("refers to a schema outside itself")
            try:
                resolver.lookup(reference)
            except Unresolvable as error:
                raise UnusableSchema("refers to a definition that it does not have") from error
        self._validator = _Validator(schema, registry=Registry(), format_checker=_FORMATS)

    def errors(self, payload: Mapping[str, Any], *, at: tuple[str | int, ...] = ("payload",)) -> list[FieldError]:
        """What is wrong with the payload, at most 20 faults; `at` is where the payload is in the request."""
        faults = list(islice(_unstorable(payload, at), MAX_ERRORS))
        if faults:
            return faults
        found: dict[str, FieldError] = {}
        for error in self._validator.iter_errors(payload):
            for path, detail in _explain(error):
                where = pointer([*at, *path])
                found.setdefault(where, FieldError(pointer=where, detail=detail))
                if len(found) == MAX_ERRORS:
                    return list(found.values())
        return list(found.values())


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _unstorable(value: object, path: tuple[str | int, ...]) -> Iterator[FieldError]:
    """JSON that PostgreSQL cannot keep: NUL characters, and numbers too large for a double."""
    match value:
        case str() if "\x00" in value:
            yield FieldError(pointer=pointer(path), detail="must not contain the character U+0000")
        case float() if not math.isfinite(value):
            yield FieldError(pointer=pointer(path), detail="is too large a number")
        case int() if value.bit_length() > MAX_BITS:
            yield FieldError(pointer=pointer(path), detail="is too large a number")
        case dict():
            for name, item in value.items():
                if "\x00" in name:
                    yield FieldError(pointer=pointer(path), detail="has a name that contains the character U+0000")
                else:
                    yield from _unstorable(item, (*path, name))
        case list():
            for index, item in enumerate(value):
                yield from _unstorable(item, (*path, index))


def _explain(error: ValidationError) -> Iterable[tuple[list[str | int], str]]:
    path = list(error.absolute_path)
    match error.validator:
        case "required":
            return [([*path, name], "is required") for name in error.validator_value if name not in error.instance]
        case "additionalProperties" | "unevaluatedProperties":
            known = error.schema.get("properties", {})
            unknown = [name for name in error.instance if name not in known]
            return [([*path, name[:MAX_NAME]], "is not a field of this type") for name in unknown]
        case "anyOf" | "oneOf" if error.context:
            return [entry for nested in _likeliest(error.context) for entry in _explain(nested)]
        case keyword:
            describe = _DETAILS.get(str(keyword))
            return [(path, describe(error.validator_value) if describe else f"does not satisfy {keyword!r}")]


def _likeliest(context: Iterable[ValidationError]) -> list[ValidationError]:
    """The errors of the alternative that the caller most likely meant: the one that was followed deepest."""
    branches: dict[object, list[ValidationError]] = {}
    for error in context:
        branches.setdefault(error.schema_path[0], []).append(error)

    def depth(errors: list[ValidationError]) -> tuple[int, bool, int]:
        deepest = max(len(error.absolute_path) for error in errors)
        wrong_kind = any(error.validator == "type" and len(error.path) == 0 for error in errors)
        return (deepest, not wrong_kind, -len(errors))

    return max(branches.values(), key=depth)


def _one_of(values: object) -> str:
    shown = [str(value) for value in islice(values if isinstance(values, list) else [values], 20)]
    return "must be one of: " + ", ".join(shown)


# The schema's own limits may be repeated, for the worker has published them; the value never.
_DETAILS: Final[Mapping[str, Callable[[Any], str]]] = {
    "type": lambda kind: "must be " + (" or ".join(kind) if isinstance(kind, list) else str(kind)),
    "enum": _one_of,
    "const": lambda value: f"must be {value}",
    "pattern": lambda pattern: f"must match the pattern {pattern}",
    "format": lambda name: f"must be a valid {name}",
    "minLength": lambda limit: f"must have at least {limit} characters",
    "maxLength": lambda limit: f"must have at most {limit} characters",
    "minimum": lambda limit: f"must be at least {limit}",
    "maximum": lambda limit: f"must be at most {limit}",
    "exclusiveMinimum": lambda limit: f"must be more than {limit}",
    "exclusiveMaximum": lambda limit: f"must be less than {limit}",
    "multipleOf": lambda factor: f"must be a multiple of {factor}",
    "minItems": lambda limit: f"must have at least {limit} items",
    "maxItems": lambda limit: f"must have at most {limit} items",
    "uniqueItems": lambda _: "must not have the same item twice",
    "minProperties": lambda limit: f"must have at least {limit} fields",
    "maxProperties": lambda limit: f"must have at most {limit} fields",
}
