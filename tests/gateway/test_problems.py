"""Every error is a problem document that says what to do, names the trace, and repeats nothing that was sent."""

from __future__ import annotations

import socket
from datetime import UTC, datetime

import httpx
import pytest

from gateway import ledger
from gateway.problems import KINDS
from gateway.scopes import Scope
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.contracts.manifest import Manifest, TypeManifest

REQUEST = {"type": "greeter.person.greet", "payload": {"name": "Ada"}}
SECRET = "hunter2-is-private"
NOBODY = "0198c0de-0000-7000-8000-000000000000"


def check(response: httpx.Response, status: int, code: str) -> dict:
    """Hold a response against what every problem promises, and return the document."""
    document = response.json()
    assert (response.status_code, document.get("code")) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert document["type"] == f"/problems/{code}"
    assert document["status"] == status
    assert document["title"] == KINDS[code].title
    assert document["instance"] == response.request.url.path
    assert document["trace_id"] == response.headers["taskmesh-trace-id"]
    assert len(document["trace_id"]) == 32
    assert SECRET not in response.text
    return document


async def test_an_unknown_type_is_answered_with_the_nearest_known_names(api):
    response = await api.http.post("/v1/tasks", json=REQUEST | {"type": "greeter.person.great"})

    document = check(response, 404, "unknown_type")
    assert document["nearest"] == ["greeter.person.greet"]
    assert document["errors"] == [{"pointer": "/type", "detail": "is not a known task type"}]


async def test_an_event_cannot_be_submitted(api):
    response = await api.http.post("/v1/tasks", json={"type": "billing.invoice.issued", "payload": {}})

    assert "event" in check(response, 404, "unknown_type")["detail"]


@pytest.mark.parametrize(
    ("payload", "pointer", "detail"),
    [
        ({}, "/payload/name", "is required"),
        ({"name": 7}, "/payload/name", "must be string"),
        ({"name": SECRET * 10}, "/payload/name", "must have at most 50 characters"),
        ({"name": "Ada", "times": SECRET}, "/payload/times", "must be integer"),
        ({"name": "Ada", "times": 1.0}, "/payload/times", "must be integer"),
        ({"name": "Ada", "times": 0}, "/payload/times", "must be at least 1"),
        ({"name": "Ada", "on": SECRET}, "/payload/on", "must be a valid date"),
        ({"name": "Ada", "a/b~c": SECRET}, "/payload/a~1b~0c", "is not a field of this type"),
        ({"name": "Ada", "nested": {"again": SECRET}}, "/payload/nested/again", "must be object"),
        ({"name": SECRET + "\x00"}, "/payload/name", "must not contain the character U+0000"),
    ],
)
async def test_a_payload_that_does_not_fit_is_pointed_at(api, payload, pointer, detail):
    response = await api.http.post("/v1/tasks", json=REQUEST | {"payload": payload})

    assert check(response, 422, "contract_violation")["errors"] == [{"pointer": pointer, "detail": detail}]


async def test_at_most_twenty_faults_are_shown(api):
    payload = {"name": "Ada", **{f"extra{index}": 1 for index in range(30)}}

    response = await api.http.post("/v1/tasks", json=REQUEST | {"payload": payload})

    assert len(check(response, 422, "contract_violation")["errors"]) == 20


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"type": 3}, "/type"),
        ({"payload": SECRET}, "/payload"),
        ({"priority": 10}, "/priority"),
        ({"tags": ["x"] * 21}, "/tags"),
        ({"tags": ["a\x00"]}, "/tags/0"),
        ({"run_at": SECRET}, "/run_at"),
        ({"run_at": "2026-01-01T00:00:00"}, "/run_at"),
        ({"delay_seconds": -1}, "/delay_seconds"),
        ({"delay_seconds": 1, "run_at": "2026-01-01T00:00:00Z"}, ""),
        ({"surprise": SECRET}, "/surprise"),
    ],
)
async def test_a_field_of_the_request_that_is_wrong_is_pointed_at(api, change, pointer):
    response = await api.http.post("/v1/tasks", json=REQUEST | change)

    assert [error["pointer"] for error in check(response, 422, "invalid_request")["errors"]] == [pointer]


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b'{"type": NaN}', b'["\\ud800"]', b"[" * 10_000, b'{"a": 1} trailing']
)
async def test_a_body_that_is_not_json_is_400(api, body):
    response = await api.http.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})

    check(response, 400, "invalid_request")


async def test_a_number_too_large_to_keep_is_pointed_at(api):
    body = b'{"type": "greeter.person.greet", "payload": {"name": "Ada", "times": 1e999}}'

    response = await api.http.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})

    assert check(response, 422, "contract_violation")["errors"][0]["pointer"] == "/payload/times"


async def test_a_body_of_another_media_type_is_415(api):
    response = await api.http.post("/v1/tasks", content=b"a=b", headers={"Content-Type": "text/plain"})

    check(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/tasks:batchCreate"])
async def test_a_body_that_is_too_large_is_413(api, path):
    size = 5 * 1024 * 1024 if path.endswith("batchCreate") else 129 * 1024
    headers = {"Content-Type": "application/json"}

    async def pieces():
        for _ in range(size // 1024):
            yield b" " * 1024

    declared = await api.http.post(path, content=b" " * size, headers=headers)
    streamed = await api.http.post(path, content=pieces(), headers=headers)

    check(declared, 413, "payload_too_large")
    check(streamed, 413, "payload_too_large")


async def test_one_task_of_a_batch_may_not_be_larger_than_a_task(api):
    large = REQUEST | {"payload": {"name": "x" * 130 * 1024}}

    response = await api.http.post("/v1/tasks:batchCreate", json={"tasks": [REQUEST, large]})

    assert check(response, 413, "payload_too_large")["errors"][0]["pointer"] == "/tasks/1/payload"


async def test_no_resource_and_no_such_method(api):
    check(await api.http.get(f"/v1/tasks/{NOBODY}"), 404, "not_found")
    check(await api.http.get("/v1/nothing"), 404, "not_found")
    check(await api.http.get("/problems/none"), 404, "not_found")
    check(await api.http.get("/v1/types/no.such.type"), 404, "unknown_type")


async def test_an_id_that_nobody_has_is_named(api):
    for path in (f"/v1/tasks/{NOBODY}", f"/v1/tasks/{NOBODY}/events", f"/v1/schedules/{NOBODY}"):
        assert NOBODY in check(await api.http.get(path), 404, "not_found")["detail"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/tasks", "GET, POST"),
        ("/v1/tasks:batchCreate", "POST"),
        (f"/v1/schedules/{NOBODY}", "DELETE, GET, PATCH"),
        ("/livez", "GET"),
    ],
)
async def test_every_method_that_an_address_knows_is_allowed_and_not_only_the_first(api, path, methods):
    response = await api.http.put(path)

    assert methods in check(response, 405, "method_not_allowed")["detail"]
    assert response.headers["allow"] == methods


async def test_a_slash_too_many_is_a_problem_and_no_redirect_to_wherever_the_host_header_says(api):
    """A caller behind TLS would be sent, with its key, to an address that begins with http."""
    check(await api.http.get("/v1/tasks/", headers={"Host": "evil.example"}), 404, "not_found")


async def test_a_problem_about_an_odd_address_names_it_as_a_uri(api):
    response = await api.http.get("/v1/types/a%20b%3Fc")

    assert response.json()["instance"] == "/v1/types/a%20b%3Fc"


async def test_no_answer_is_stored_on_the_way_or_read_as_what_it_is_not(api):
    for response in (await api.http.get("/v1/tasks"), await api.http.get("/v1/nothing"), await api.http.get("/livez")):
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_an_integer_that_overflows_the_validators_arithmetic_is_pointed_at(api):
    schema = {"properties": {"price": {"type": "number", "multipleOf": 0.01}}}
    priced = TypeManifest(type="shop.goods.price", kind=TaskKind.COMMAND, queue="shop", payload_schema=schema)
    await api.announce(Manifest(service="shop", release="1", types=(priced,), announced_at=datetime.now(UTC)))
    body = b'{"type": "shop.goods.price", "payload": {"price": 1%s}}' % (b"0" * 400)

    response = await api.http.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})

    assert check(response, 422, "contract_violation")["errors"][0]["pointer"] == "/payload/price"


@pytest.mark.parametrize("moment", [1_700_000_000, "1700000000", "2999-01-01", "2999-01-01T00:00:00", SECRET])
async def test_a_time_that_is_not_rfc_3339_is_refused_and_not_guessed_at(api, moment):
    response = await api.http.post("/v1/tasks", json=REQUEST | {"run_at": moment})

    [error] = check(response, 422, "invalid_request")["errors"]
    assert error["pointer"] == "/run_at"
    assert "RFC 3339" in error["detail"]


async def test_an_id_that_is_no_uuid_is_pointed_at(api):
    response = await api.http.get("/v1/tasks/not-a-uuid")

    assert check(response, 422, "invalid_request")["errors"][0]["pointer"] == "/path:task_id"


@pytest.mark.parametrize(
    "authorization", [None, "Basic abc", "Bearer", "Bearer nonsense", f"Bearer tm_{NOBODY}_{SECRET}", "Bearer tm_x_y"]
)
async def test_without_a_valid_key_nothing_is_told(api, authorization):
    headers = {"Authorization": authorization} if authorization else {}

    async with httpx.AsyncClient(base_url=api.url) as stranger:
        response = await stranger.post("/v1/tasks", json=REQUEST, headers=headers)

    check(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_a_key_with_the_wrong_secret_is_refused(api):
    response = await api.http.get("/v1/tasks", headers={"Authorization": f"Bearer {api.key}x"})

    check(response, 401, "unauthenticated")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/tasks", Scope.TASKS_WRITE),
        ("POST", "/v1/tasks:batchCreate", Scope.TASKS_WRITE),
        ("GET", "/v1/tasks", Scope.TASKS_READ),
        ("GET", f"/v1/tasks/{NOBODY}", Scope.TASKS_READ),
        ("GET", f"/v1/tasks/{NOBODY}/events", Scope.TASKS_READ),
        ("GET", "/v1/types", Scope.TYPES_READ),
        ("GET", "/v1/types/greeter.person.greet", Scope.TYPES_READ),
    ],
)
async def test_a_key_without_the_scope_is_refused_by_its_name(api, method, path, scope):
    key = await api.new_key(*(other for other in Scope if other is not scope))
    body = {"json": {"tasks": [REQUEST]} if path.endswith("batchCreate") else REQUEST} if method == "POST" else {}

    response = await api.http.request(method, path, headers={"Authorization": f"Bearer {key}"}, **body)

    assert scope.value in check(response, 403, "forbidden")["detail"]


async def test_what_nobody_foresaw_is_500_without_its_text(api, monkeypatch):
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(ledger, "submit", broken)

    check(await api.http.post("/v1/tasks", json=REQUEST), 500, "internal")


async def test_every_kind_of_problem_is_explained(api):
    listed = (await api.http.get("/problems")).json()["items"]

    assert {item["code"] for item in listed} == set(KINDS)
    for code, kind in KINDS.items():
        page = await api.http.get(f"/problems/{code}")
        document = await api.http.get(f"/problems/{code}", headers={"Accept": "application/json"})
        assert kind.advice in page.text
        assert document.json()["advice"] == kind.advice


async def test_a_request_with_an_endless_header_does_not_reach_the_application(api):
    """The server's own limit answers; the process goes on."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")

    assert (await api.http.get("/livez")).json() == {"status": "alive"}
