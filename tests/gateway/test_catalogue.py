"""The catalogue: what workers announce is known at once, shown as it is, and checked before anything is stored."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_event

from gateway import catalogue
from gateway.catalogue import Catalogue
from gateway.payloads import PayloadValidator, UnusableSchema
from taskmesh.contracts.billing import IssueInvoice
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, TypeManifest


def announcement(service: str = "printer", *types: TypeManifest, at: datetime | None = None, **fields: Any) -> Manifest:
    return Manifest(
        service=service, release="1", types=types or (command(),), announced_at=at or datetime.now(UTC), **fields
    )


def command(name: str = "printer.page.print", schema: dict[str, Any] | None = None, **fields: Any) -> TypeManifest:
    return TypeManifest(
        type=name, kind=TaskKind.COMMAND, queue="printer", payload_schema=schema or {"type": "object"}, **fields
    )


async def test_the_types_are_listed_as_they_were_announced(api):
    listed = (await api.http.get("/v1/types")).json()["items"]

    assert [(item["type"], item["service"], item["kind"]) for item in listed] == [
        ("billing.invoice.issued", "greeter", "event"),
        ("greeter.person.greet", "greeter", "command"),
    ]
    assert set(listed[1]) == {
        "type",
        "service",
        "kind",
        "version",
        "title",
        "description",
        "payload_schema",
        "max_attempts",
        "queue",
        "announced_at",
    }
    one = await api.http.get("/v1/types/greeter.person.greet")
    assert one.json() == listed[1]


async def test_a_worker_that_joins_is_known_without_a_restart(api):
    before = await api.http.post("/v1/tasks", json={"type": "printer.page.print", "payload": {}})

    await api.announce(announcement())

    after = await api.http.post("/v1/tasks", json={"type": "printer.page.print", "payload": {}})
    document = (await api.http.get("/openapi.json")).json()
    assert (before.status_code, after.status_code) == (404, 202)
    assert after.json()["service"] == "printer"
    assert "printer.page.print" in document["components"]["schemas"]


async def test_a_changed_schema_is_used_within_a_second(api, eventually):
    await api.announce(announcement())
    request = {"type": "printer.page.print", "payload": {}}
    assert (await api.http.post("/v1/tasks", json=request)).status_code == 202

    await api.announce(announcement("printer", command(schema={"type": "object", "required": ["page"]})))

    async def refused() -> bool:
        return (await api.http.post("/v1/tasks", json=request)).status_code == 422

    await eventually(refused)


async def test_the_newest_announcement_wins_whenever_it_comes(api):
    now = datetime.now(UTC)

    async with api.engine.begin() as connection:
        newer = await catalogue.store(connection, announcement("printer", command("printer.a.b"), at=now))
        older = await catalogue.store(
            connection, announcement("printer", command("printer.c.d"), at=now - timedelta(seconds=1))
        )

    types = {item["type"] for item in (await api.http.get("/v1/types")).json()["items"]}
    assert (newer, older) == (True, False)
    assert "printer.a.b" in types
    assert "printer.c.d" not in types


async def test_an_announcement_that_says_nothing_new_changes_nothing(gateway_engine):
    now = datetime.now(UTC)

    async with gateway_engine.begin() as connection:
        first = await catalogue.store(connection, announcement(at=now))
        again = await catalogue.store(connection, announcement(at=now + timedelta(seconds=30)))

    assert (first, again) == (True, False)


async def test_a_hundred_askers_at_once_are_one_query(gateway_engine):
    known = Catalogue(gateway_engine)
    statements: list[str] = []
    sqlalchemy_event.listen(
        gateway_engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )

    await asyncio.gather(*(known.current() for _ in range(100)))

    assert len(statements) == 1


async def test_one_unusable_schema_leaves_the_other_types_alone(api):
    broken = command("printer.bad.one", schema={"type": "no such type"})

    await api.announce(announcement("printer", broken, command()))

    types = {item["type"] for item in (await api.http.get("/v1/types")).json()["items"]}
    assert "printer.page.print" in types
    assert "printer.bad.one" not in types


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 7},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/$defs/Missing"},
        {"properties": {"a": {"$ref": "other.json"}}},
    ],
)
def test_a_schema_that_needs_anything_outside_itself_is_refused(schema):
    with pytest.raises(UnusableSchema):
        PayloadValidator(schema)


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("^[A-Z]{3}$", "EUR", True),
        ("^[A-Z]{3}$", "EUR\n", False),
        (r"^\$$", "$", True),
        ("^[$]$", "$\n", False),
        ("^[^]$]+$", "EUR", True),
        ("^(a$|b)", "a\n", False),
    ],
)
def test_a_text_with_a_last_newline_fits_a_pattern_only_if_the_worker_takes_it(pattern, text, fits):
    """Else it would be accepted here and dead-lettered there."""
    validator = PayloadValidator({"properties": {"text": {"type": "string", "pattern": pattern}}})

    assert (validator.errors({"text": text}) == []) is fits


@pytest.mark.parametrize(
    ("iri", "is_iri", "is_reference"),
    [
        ("https://münchen.example/straße?q=ü#é", True, True),
        ("https://example.com/\U0001f600", True, True),
        ("https://[::1]:80/a", True, True),
        ("urn:größe:1", True, True),
        ("/straße?q=\ue000", False, True),
        ("", False, True),
        ("https://example.com/\ue000", False, False),  # for private use: in a query only
        ("https://example.com/\ufdd0", False, False),  # no character
        ("https://example.com/\x85", False, False),
        ("https://example.com/a b", False, False),
        ("https://example.com/%zz", False, False),
        ("https://example.com/#a#b", False, False),
        ("https://example.com/\n", False, False),
        ("1st:a", False, False),
    ],
)
def test_an_iri_is_a_uri_with_the_characters_of_other_languages(iri, is_iri, is_reference):
    schema = {"properties": {"iri": {"format": "iri"}, "reference": {"format": "iri-reference"}}}

    faults = {error.pointer for error in PayloadValidator(schema).errors({"iri": iri, "reference": iri})}

    expected = {"/payload/iri": is_iri, "/payload/reference": is_reference}
    assert faults == {pointer for pointer, is_one in expected.items() if not is_one}


FORMATS = {
    "date": "2026-02-30",
    "date-time": "2026-02-30T00:00:00Z",
    "duration": "1 day",
    "email": "nobody",
    "hostname": "a_b.example",
    "idn-email": "nobody",
    "idn-hostname": "\u302e",
    "ipv4": "1.2.3.256",
    "ipv6": "1::2::3",
    "iri": "a b",
    "iri-reference": "a b",
    "json-pointer": "a",
    "regex": "(",
    "relative-json-pointer": "/a",
    "time": "25:00:00Z",
    "uri": "a b",
    "uri-reference": "a b",
    "uri-template": "{a",
    "uuid": "4711",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_json_schema_is_checked(name):
    """Each takes a package of its own, and without it jsonschema would pass whatever comes."""
    validator = PayloadValidator({"properties": {"text": {"type": "string", "format": name}}})

    assert [error.detail for error in validator.errors({"text": FORMATS[name]})] == [f"must be a valid {name}"]


def test_an_invoice_is_held_against_the_schema_that_billing_announces():
    """The faults of the demo's three bad invoices are named by their fields."""
    validator = PayloadValidator(IssueInvoice.model_json_schema())
    good = {
        "buyer": {"name": "Ada", "address": ["1 Way"], "country": "GB", "email": "ada@example.com"},
        "currency": "EUR",
        "lines": [{"description": "Work", "unit_price": "1.00", "tax": {"rate": "19"}}],
    }

    def faults(**changes: Any) -> set[str]:
        return {error.pointer for error in validator.errors(good | changes)}

    assert faults() == set()
    assert faults(supply_date="2026-02-30") == {"/payload/supply_date"}
    assert faults(currency="euro", lines=[]) == {"/payload/currency", "/payload/lines"}
    assert faults(lines=[good["lines"][0] | {"unit_price": 1.0}]) == {"/payload/lines/0/unit_price"}
    assert faults(buyer=good["buyer"] | {"vat_id": "?"}) == {"/payload/buyer/vat_id"}
    assert faults(lines=[{"description": "x", "unit_price": "1", "tax": {"rate": "1", "category": "Q"}}]) == {
        "/payload/lines/0/tax/category"
    }


async def test_the_openapi_document_describes_each_command_and_refers_to_nothing_that_is_missing(api):
    await api.announce(announcement("billing", command(IssueInvoice.type_name, IssueInvoice.model_json_schema())))

    document = (await api.http.get("/openapi.json")).json()

    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["discriminator"]["mapping"]) == {"greeter.person.greet", "billing.invoice.issue"}
    assert schemas["TaskSubmission.greeter.person.greet"]["properties"]["payload"]["$ref"].endswith(
        "/greeter.person.greet"
    )
    assert schemas["billing.invoice.issue"]["properties"]["buyer"]["$ref"].endswith("/billing.invoice.issue.Buyer")
    assert body["examples"]["greeter.person.greet"]["value"] == {
        "type": "greeter.person.greet",
        "payload": {"name": "text"},
    }
    missing = {
        reference
        for reference in _references(document)
        if reference.removeprefix("#/components/schemas/") not in schemas
    }
    assert missing == set()


async def test_every_route_declares_its_problems(api):
    document = (await api.http.get("/openapi.json")).json()

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/v1/"):
                assert {"401", "403", "500", "503"} <= operation["responses"].keys(), (method, path)
                assert ("400" in operation["responses"]) is ("requestBody" in operation), (method, path)
                for status, response in operation["responses"].items():
                    if status >= "400":
                        assert set(response["content"]) == {"application/problem+json"}, (method, path, status)


async def test_the_documentation_page_is_there(api):
    response = await api.http.get("/docs")

    assert response.status_code == 200
    parts = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert [part for part in parts if not part.startswith("/docs/")] == ["data:,"], "nothing comes from elsewhere"
    for part in parts[1:]:
        assert (await api.http.get(part)).status_code == 200, part
    assert "/openapi.json" in (await api.http.get("/docs/start.js")).text
    assert "'unsafe" not in response.headers["content-security-policy"]


async def test_the_openapi_documents_components_have_names_that_tools_accept(api):
    document = (await api.http.get("/openapi.json")).json()

    names = [name for kind in document["components"].values() for name in kind]
    assert [name for name in names if not re.fullmatch(r"[A-Za-z0-9._-]+", name)] == []


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(_references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(_references(value) for value in node))
    return set()


async def test_the_openapi_document_without_any_worker_still_describes_a_submission(api):
    from sqlalchemy import delete

    from gateway.models import manifests

    async with api.engine.begin() as connection:
        await connection.execute(delete(manifests))

    document = (await api.http.get("/openapi.json")).json()

    body = document["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]
    assert json.dumps(body["schema"]) == '{"$ref": "#/components/schemas/TaskSubmission"}'
