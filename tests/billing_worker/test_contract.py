"""What billing's contract refuses, alike in its JSON Schema (the gateway's check) and in Pydantic (the worker's)."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from taskmesh.contracts.billing import IssueInvoice

SCHEMA = IssueInvoice.model_json_schema()
GOOD = SCHEMA["examples"][0]


def changed(pointer: str, value: Any) -> dict[str, Any]:
    payload: dict[str, Any] = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in pointer.strip("/").split("/")]
    place: Any = payload
    for parent in parents:
        place = place[parent]
    place[last] = value
    return payload


def test_the_schema_s_example_is_accepted() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(GOOD)
    IssueInvoice.model_validate(GOOD)


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("/currency", "EUX"),
        ("/currency", "XAU"),
        ("/currency", "eur"),
        ("/due_days", True),
        ("/due_days", 366),
        ("/lines", []),
        ("/lines/0/quantity", 2),
        ("/lines/0/unit_price", "1,50"),
        ("/lines/0/unit_price", "1e3"),
        ("/lines/0/unit_price", "٣"),
        ("/lines/0/description", "   "),
        ("/lines/0/description", "a\x00b"),
        ("/lines/0/tax/rate", "101"),
        ("/lines/0/tax/rate", "-1"),
        ("/lines/0/tax/rate", "0"),
        ("/lines/0/tax/category", "X"),
        ("/lines/0/tax/exemption_reason", "because"),
        ("/buyer/name", ""),
        ("/buyer/name", "paid \u202e00.1"),
        ("/buyer/email", "nobody"),
        ("/buyer/email", "a@b"),
        ("/buyer/email", "a\r\nBcc: x@example.com"),
        ("/buyer/locale", "german"),
        ("/buyer/country", "Germany"),
        ("/buyer_reference", "x" * 101),
    ],
)
def test_a_bad_field_is_refused_by_schema_and_model_and_named(pointer: str, value: Any) -> None:
    payload = changed(pointer, value)

    refused = [
        "/" + "/".join(str(part) for part in e.absolute_path) for e in Draft202012Validator(SCHEMA).iter_errors(payload)
    ]

    assert refused
    assert all(place == pointer for place in refused)
    with pytest.raises(ValidationError):
        IssueInvoice.model_validate_json(json.dumps(payload))


@pytest.mark.parametrize(
    ("tax", "place"),
    [
        ({"category": "E", "rate": "0"}, ""),
        ({"category": "E", "rate": "0", "exemption_reason": None}, "/exemption_reason"),
        ({"category": "E", "rate": "7", "exemption_reason": "training"}, "/rate"),
        ({"category": "AE", "rate": "19"}, "/rate"),
        ({"category": "Z", "rate": "0", "exemption_reason": "books"}, "/exemption_reason"),
        ({"category": "S", "rate": "0.00"}, "/rate"),
        ({"rate": "000"}, "/rate"),
    ],
)
def test_a_tax_that_contradicts_itself_is_refused_by_schema_and_model(tax: dict[str, Any], place: str) -> None:
    payload = changed("/lines/0/tax", tax)

    refused = {
        "/" + "/".join(str(part) for part in e.absolute_path) for e in Draft202012Validator(SCHEMA).iter_errors(payload)
    }

    assert refused == {f"/lines/0/tax{place}"}
    with pytest.raises(ValidationError):
        IssueInvoice.model_validate(payload)


@pytest.mark.parametrize(
    "tax",
    [
        {"category": "S", "rate": "100.00"},
        {"rate": "0.5", "exemption_reason": None},
        {"category": "Z", "rate": "0"},
        {"category": "AE", "rate": "0.00"},
        {"category": "K", "rate": "0", "exemption_reason": "Art. 138"},
        {"category": "E", "rate": "0", "exemption_reason": "Art. 132"},
    ],
)
def test_a_tax_that_fits_together_is_accepted_by_schema_and_model(tax: dict[str, Any]) -> None:
    payload = changed("/lines/0/tax", tax)

    Draft202012Validator(SCHEMA).validate(payload)
    IssueInvoice.model_validate(payload)
