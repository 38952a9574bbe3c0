"""Dead letters over HTTP: found, shown, sent again once, put away; and many of them at a chosen rate."""

from __future__ import annotations

import asyncio
import base64
import zlib
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import func, select

from gateway.dead_letters import replaying, store
from gateway.models import dead_letters, tasks
from gateway.projector import Projector
from gateway.scopes import Scope
from taskmesh import celery_protocol, exchanges
from taskmesh.celery_protocol import TaskMessage
from taskmesh.consuming import Delivery
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.outbox import outbox
from taskmesh.topology import COMMANDS, LIFECYCLE_QUEUE

from .test_diagnosing import dead, failed, told

TYPE = "greeter.person.greet"
URL = "/v1/dead-letters"


@pytest_asyncio.fixture
async def projector(api) -> Projector:
    return Projector(api.engine)


def greeting(**fields: Any) -> TaskMessage:
    return TaskMessage(**({"type": TYPE, "id": uuid4(), "payload": {"name": "Ada"}} | fields))


async def letter_of(api, **query: Any) -> dict[str, Any]:
    """The one letter that matches."""
    [letter] = (await api.http.get(URL, params=query)).json()["items"]
    return letter


async def rows(api, statement) -> list[Any]:
    async with api.engine.connect() as connection:
        return list((await connection.execute(statement)).all())


async def test_a_list_goes_page_by_page_and_nothing_of_a_message_is_in_it(api, projector):
    await projector.handle([dead(greeting()) for _ in range(5)])

    found, cursor = [], None
    while True:
        page = (await api.http.get(URL, params={"limit": 2, **({"cursor": cursor} if cursor else {})})).json()
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    ids = [letter["id"] for letter in found]
    assert (len(ids), ids) == (5, sorted(ids, reverse=True))
    assert not {"body", "headers", "payload"} & found[0].keys()
    assert found[0]["service"] == "greeter"


@pytest.mark.parametrize("cursor", ["x", "bm8", "WyJhIl0", "Wy0xXQ"])
async def test_a_cursor_of_nobodys_is_refused(api, cursor):
    assert (await api.http.get(URL, params={"cursor": cursor})).status_code == 422


async def test_each_filter_narrows_the_list(api, projector):
    message = greeting()
    await projector.handle([dead(message), dead(body=b"?", reason="delivery_limit", queue="other.events")])
    letter = await letter_of(api, task_id=str(message.id))

    for query in (
        {"service": "greeter"},
        {"type": TYPE, "code": "rejected"},
        {"reason": "rejected"},
        {"code": "rejected"},
        {"fingerprint": letter["error_fingerprint"]},
    ):
        assert (await letter_of(api, **query))["id"] == letter["id"], query
    assert (await api.http.get(URL, params={"until": "2020-01-01T00:00:00Z"})).json()["items"] == []
    assert (await api.http.get(URL, params={"state": "replayed"})).json()["items"] == []
    assert (await api.http.get(URL, params={"state": "odd"})).status_code == 422


async def test_groups_count_what_died_of_the_same(api, projector):
    await projector.handle([dead(greeting(payload={})) for _ in range(3)] + [dead(body=b"?")])

    groups = (await api.http.get(f"{URL}/groups")).json()["items"]

    assert [(group["count"], group["code"]) for group in groups] == [(3, "contract_violation"), (1, "malformed")]
    assert groups[0]["error"] == "/payload/name is required"
    sample = (await api.http.get(f"{URL}/{groups[0]['sample_id']}")).json()
    assert sample["error_fingerprint"] == groups[0]["fingerprint"]


async def test_a_letter_is_shown_with_body_headers_and_the_history_of_its_task(api, projector):
    message = greeting(traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    await projector.handle([told(failed(message.id)), dead(message)])

    letter = (await api.http.get(f"{URL}/{(await letter_of(api))['id']}")).json()

    assert (
        celery_protocol.decode(letter["headers"], letter["properties"], letter["body"]["text"].encode()).id
        == message.id
    )
    assert [step["state"] for step in letter["history"]] == ["failed"]
    assert letter["task_url"] == f"/v1/tasks/{message.id}"
    assert letter["trace_id"] == "a" * 32
    assert letter["body"]["truncated"] is False


async def test_a_body_that_is_no_text_is_shown_in_base64(api, projector):
    await projector.handle([dead(body=b"\xff\x00")])

    letter = (await api.http.get(f"{URL}/{(await letter_of(api))['id']}")).json()

    assert base64.b64decode(letter["body"]["base64"]) == b"\xff\x00"


async def test_a_replay_is_a_new_task_linked_to_the_old_one(api, projector):
    message = greeting(retries=2)
    await projector.handle([dead(message)])
    letter = await letter_of(api)

    response = await api.http.post(f"{URL}/{letter['id']}:replay")

    assert response.status_code == 202, response.text
    task, resolved = response.json()["task"], response.json()["letter"]
    assert (task["type"], task["payload"], task["retry_of"]) == (TYPE, {"name": "Ada"}, str(message.id))
    assert task["root_id"] == str(message.id)
    assert response.headers["location"] == f"/v1/tasks/{task['id']}"
    assert (resolved["state"], resolved["replay_task_id"]) == ("replayed", task["id"])
    [old] = await rows(api, select(tasks.c.retried_as).where(tasks.c.id == message.id))
    assert str(old.retried_as) == task["id"]
    [sent] = await rows(api, select(outbox))
    assert (sent.exchange, sent.routing_key, str(sent.task_id)) == (COMMANDS, TYPE, task["id"])
    assert not [name for name in sent.headers if name.startswith("x-")]
    assert celery_protocol.decode(sent.headers, sent.properties, bytes(sent.body)).retries == 0


async def test_a_listeners_letter_goes_back_to_its_service_alone(api, projector):
    event = greeting(type="billing.invoice.issued", kind=TaskKind.EVENT, payload={})
    await projector.handle([dead(event, queue="greeter.events")])

    await api.http.post(f"{URL}/{(await letter_of(api))['id']}:replay")

    [sent] = await rows(api, select(outbox))
    assert (sent.exchange, sent.routing_key) == (exchanges.DIRECT, "greeter.events")
    assert sent.headers[celery_protocol.EVENT_ID_HEADER] == str(event.id)


async def test_a_letter_is_mended_under_the_schema(api, projector):
    await projector.handle([dead(greeting(payload={"name": 5}))])
    letter = await letter_of(api)
    url = f"{URL}/{letter['id']}:replay"

    unmended = await api.http.post(url)
    worse = await api.http.post(url, json={"payload": {"nome": "Ada"}})
    mended = await api.http.post(url, json={"payload": {"name": "Grace"}})

    assert (unmended.status_code, unmended.json()["code"]) == (422, "contract_violation")
    assert [error["pointer"] for error in unmended.json()["errors"]] == ["/payload/name"]
    assert worse.status_code == 422
    assert (mended.status_code, mended.json()["task"]["payload"]) == (202, {"name": "Grace"})


async def test_a_letter_that_cannot_be_read_is_replayed_as_what_it_was_to_be(api, projector):
    await projector.handle([dead(body=b"?", headers={"id": "nobody", "task": None})])
    url = f"{URL}/{(await letter_of(api))['id']}:replay"

    refused = await api.http.post(url, json={"payload": {"name": "Ada"}})
    replayed = await api.http.post(url, json={"type": TYPE, "payload": {"name": "Ada"}})

    assert (refused.status_code, refused.json()["code"]) == (422, "unreadable")
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/type"]
    assert replayed.json()["task"]["retry_of"] is None


async def test_a_letter_of_an_unknown_type_is_refused_until_a_worker_announces_it(api, projector):
    await projector.handle([dead(greeting(type="greeter.person.hug"))])

    response = await api.http.post(f"{URL}/{(await letter_of(api))['id']}:replay")

    assert (response.status_code, response.json()["code"]) == (404, "unknown_type")


async def test_a_lifecycle_message_goes_back_byte_for_byte(api, projector):
    garbage = Delivery(
        queue=LIFECYCLE_QUEUE, exchange=exchanges.LIFECYCLE, routing_key="task.failed.greeter",
        headers={"x-delivery-count": 4, "kept": 1}, properties={"content_type": "application/json"},
        body=b"\xffgarbage", delivery_count=0, tag=1,
    )  # fmt: skip
    await projector.handle([garbage])

    response = await api.http.post(f"{URL}/{(await letter_of(api))['id']}:replay")

    assert (response.status_code, response.json()["task"]) == (202, None)
    [sent] = await rows(api, select(outbox))
    assert (sent.exchange, sent.routing_key, bytes(sent.body), sent.headers) == (
        exchanges.LIFECYCLE, "task.failed.greeter", b"\xffgarbage", {"kept": 1},
    )  # fmt: skip


async def test_concurrent_replays_of_one_letter_make_one_task(api, projector):
    await projector.handle([dead(greeting())])
    url = f"{URL}/{(await letter_of(api))['id']}:replay"

    responses = await asyncio.gather(*(api.http.post(url) for _ in range(8)))

    assert sorted(response.status_code for response in responses) == [202, *[409] * 7]
    [winner] = [response.json()["task"]["id"] for response in responses if response.status_code == 202]
    losers = [response for response in responses if response.status_code == 409]
    assert {loser.headers["location"] for loser in losers} == {f"/v1/tasks/{winner}"}
    assert {loser.json()["code"] for loser in losers} == {"already_resolved"}
    assert len(await rows(api, select(outbox))) == 1


async def test_a_letter_whose_task_was_handled_after_all_is_not_run_twice(api, projector):
    accepted = await api.submit()
    async with api.engine.begin() as connection:
        await connection.execute(tasks.update().values(state="succeeded"))
    await projector.handle([dead(greeting(id=UUID(accepted["id"])))])

    response = await api.http.post(f"{URL}/{(await letter_of(api))['id']}:replay")

    assert (response.status_code, response.json()["code"]) == (409, "not_failed")


async def test_retrying_the_task_resolves_its_letter(api, projector):
    message = greeting()
    await projector.handle([dead(message)])

    retried = await api.http.post(f"/v1/tasks/{message.id}:retry", json={"payload": {"name": "Ada"}})

    assert retried.status_code == 202, retried.text
    assert (await letter_of(api))["replay_task_id"] == retried.json()["id"]


async def test_a_discarded_letter_keeps_its_note_and_stays_discarded(api, projector):
    await projector.handle([dead(greeting())])
    url = f"{URL}/{(await letter_of(api))['id']}"

    discarded = await api.http.post(f"{url}:discard", json={"note": "a test of mine"})
    again = await api.http.post(f"{url}:discard")
    replayed = await api.http.post(f"{url}:replay")

    assert (discarded.json()["state"], discarded.json()["resolution_note"]) == ("discarded", "a test of mine")
    assert (again.status_code, again.json()["resolution_note"]) == (200, "a test of mine")
    assert (replayed.status_code, replayed.json()["code"]) == (409, "already_resolved")
    assert await rows(api, select(outbox)) == []


async def test_a_replayed_letter_cannot_be_discarded(api, projector):
    await projector.handle([dead(greeting())])
    url = f"{URL}/{(await letter_of(api))['id']}"
    await api.http.post(f"{url}:replay")

    assert (await api.http.post(f"{url}:discard")).status_code == 409


async def test_many_letters_are_replayed_at_the_rate_that_was_asked_for(api, projector):
    """The first at once, each other one a tenth of a second after the one before."""
    await projector.handle([dead(greeting()) for _ in range(11)])
    request = {"filter": {"service": "greeter"}, "rate_per_second": 10}

    view = (await api.http.post(f"{URL}:replay", json=request)).json()

    assert (view["matched"], view["replayed"], view["refused"]) == (11, 11, 0)
    due = {row.due_at for row in await rows(api, select(outbox.c.due_at))}
    begin, end = (datetime.fromisoformat(view[name]) for name in ("first_due_at", "last_due_at"))
    assert (len(due), (end - begin).total_seconds()) == (11, pytest.approx(1.0))
    assert due >= {begin + timedelta(milliseconds=100 * place) for place in range(1, 11)}


async def test_a_dry_run_says_what_would_be_done_and_does_nothing(api, projector):
    batch = [dead(greeting()) for _ in range(4)] + [dead(greeting(payload={})), dead(body=b"?", headers={"id": None})]
    await projector.handle(batch)
    request = {"filter": {}, "dry_run": True, "rate_per_second": 2}

    planned = (await api.http.post(f"{URL}:replay", json=request)).json()
    done = (await api.http.post(f"{URL}:replay", json=request | {"dry_run": False})).json()

    assert [(reason["code"], reason["count"]) for reason in planned["reasons"]] == [
        ("contract_violation", 1),
        ("unreadable", 1),
    ]
    same = ("matched", "replayed", "refused", "reasons")
    assert {name: planned[name] for name in same} == {name: done[name] for name in same}
    assert len(await rows(api, select(outbox))) == 4
    open_ones = (await api.http.get(URL, params={"state": "open"})).json()["items"]
    assert {letter["code"] for letter in open_ones} == {"contract_violation", "malformed"}


async def test_a_task_that_died_twice_is_replayed_once(api, projector):
    message = greeting()
    await projector.handle([dead(message), dead(message, reason="delivery_limit")])

    view = (await api.http.post(f"{URL}:replay", json={"filter": {}})).json()

    assert view["replayed"] == 1
    letters = (await api.http.get(URL)).json()["items"]
    assert [letter["state"] for letter in letters] == ["replayed", "replayed"]
    assert len({letter["replay_task_id"] for letter in letters}) == 1


async def test_concurrent_bulk_replays_send_each_letter_once(api, projector):
    await projector.handle([dead(greeting()) for _ in range(300)])

    views = await asyncio.gather(*(api.http.post(f"{URL}:replay", json={"filter": {}}) for _ in range(3)))

    assert sum(view.json()["replayed"] for view in views) == 300
    assert len(await rows(api, select(outbox))) == 300


async def test_a_limit_takes_the_oldest_letters(api, projector):
    await projector.handle([dead(greeting()) for _ in range(5)])

    view = (await api.http.post(f"{URL}:discard", json={"filter": {}, "limit": 2, "note": "old"})).json()

    assert (view["matched"], view["discarded"]) == (5, 2)
    letters = (await api.http.get(URL)).json()["items"]
    assert [letter["state"] for letter in letters] == ["open", "open", "open", "discarded", "discarded"]


async def test_many_letters_are_discarded_and_a_dry_run_counts_them(api, projector):
    await projector.handle([dead(greeting()) for _ in range(3)])
    request = {"filter": {"code": "rejected"}}

    dry = (await api.http.post(f"{URL}:discard", json=request | {"dry_run": True})).json()
    real = (await api.http.post(f"{URL}:discard", json=request)).json()

    assert (dry["discarded"], real["discarded"]) == (3, 3)
    assert (await api.http.get(URL, params={"state": "open"})).json()["items"] == []


@pytest.mark.parametrize(
    "request_body", [{}, {"filter": {"no": 1}}, {"filter": {}, "rate_per_second": 0}, {"filter": {}, "limit": 10_001}]
)
async def test_a_bulk_request_names_its_filter_and_keeps_to_the_limits(api, request_body):
    assert (await api.http.post(f"{URL}:replay", json=request_body)).status_code == 422


async def test_each_right_is_asked_for(api, projector):
    await projector.handle([dead(greeting())])
    letter = await letter_of(api)
    reader = {"Authorization": f"Bearer {await api.new_key(Scope.DEAD_LETTERS_READ)}"}
    writer = {"Authorization": f"Bearer {await api.new_key(Scope.DEAD_LETTERS_WRITE)}"}
    requests = [
        ("GET", URL, reader, writer),
        ("GET", f"{URL}/groups", reader, writer),
        ("GET", f"{URL}/{letter['id']}", reader, writer),
        ("POST", f"{URL}/{letter['id']}:replay", writer, reader),
        ("POST", f"{URL}/{letter['id']}:discard", writer, reader),
    ]

    async with httpx.AsyncClient(base_url=api.url) as http:
        for method, url, allowed, refused in requests:
            assert (await http.request(method, url, headers=refused)).status_code == 403, url
            assert (await http.request(method, url, headers=allowed)).status_code in {200, 202, 409}, url


@pytest.mark.parametrize("letter_id", ["1", "0", "-1", "x", str(2**63)])
async def test_a_letter_that_is_not_there_is_not_found(api, letter_id):
    for method, action in (("GET", ""), ("POST", ":replay"), ("POST", ":discard")):
        response = await api.http.request(method, f"{URL}/{letter_id}{action}")
        assert response.status_code == (404 if letter_id == "1" else 422), (method, action)


async def test_resolved_letters_are_forgotten_after_their_time_and_open_ones_kept(api, projector):
    from datetime import timedelta

    await projector.handle([dead(greeting()) for _ in range(3)])
    [_, second, third] = [letter["id"] for letter in (await api.http.get(URL)).json()["items"]]
    for letter_id in (second, third):
        await api.http.post(f"{URL}/{letter_id}:discard")
    async with api.engine.begin() as connection:
        old = dead_letters.update().where(dead_letters.c.id == third)
        await connection.execute(old.values(resolved_at=func.now() - timedelta(days=31)))
        forgotten = await store.forget_resolved(connection, timedelta(days=30), limit=10)

    assert forgotten == 1
    assert third not in [letter["id"] for letter in (await api.http.get(URL)).json()["items"]]


async def test_a_payload_without_bottom_spoils_no_bulk_replay(api, projector):
    bottomless = b'[[],{"name":"Ada","nested":' + b'{"again":' * 300 + b"{}" + b"}" * 300 + b"},{}]"
    await projector.handle([dead(greeting()), dead(greeting(), body=bottomless)])

    response = await api.http.post(f"{URL}:replay", json={"filter": {}})

    assert response.status_code == 200, response.text
    view = response.json()
    assert (view["replayed"], view["refused"], [each["code"] for each in view["reasons"]]) == (1, 1, ["unreadable"])


async def test_a_rate_that_ends_after_the_calendar_is_refused_before_anything_is_done(api, projector):
    await projector.handle([dead(greeting()), dead(greeting())])

    response = await api.http.post(f"{URL}:replay", json={"filter": {}, "rate_per_second": 1e-13})

    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/rate_per_second")


async def test_large_letters_are_replayed_in_parts_that_fit_into_memory(api, projector, monkeypatch):
    monkeypatch.setattr(replaying, "BYTES_AT_ONCE", 20_000)
    read: list[int] = []
    plan_all = replaying._plan_all

    def counted(rows, *arguments):
        read.append(sum(len(row.body) for row in rows))
        return plan_all(rows, *arguments)

    monkeypatch.setattr(replaying, "_plan_all", counted)
    padding = b" " * 9_000
    letters = [greeting() for _ in range(5)]
    bodies = [celery_protocol.encode(letter)[2] + padding for letter in letters]
    await projector.handle([dead(letter, body=body) for letter, body in zip(letters, bodies, strict=True)])

    view = (await api.http.post(f"{URL}:replay", json={"filter": {}})).json()

    assert (view["replayed"], len(read), max(read) <= 20_000) == (5, 3, True)


async def test_a_body_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(api, projector):
    bomb = zlib.compress(b'[[],{"name":"' + b"a" * 50_000_000 + b'"},{}]')
    await projector.handle([dead(greeting(), body=bomb, headers={"compression": "application/x-gzip"})])

    assert (await letter_of(api))["error"] == "body is too large, or cut off"


async def test_a_key_that_may_only_write_reads_no_payload_by_replaying(api, projector):
    await projector.handle([dead(greeting())])
    writer = {"Authorization": f"Bearer {await api.new_key(Scope.DEAD_LETTERS_WRITE)}"}

    response = await api.http.post(f"{URL}/{(await letter_of(api))['id']}:replay", headers=writer)

    assert (response.status_code, response.json()["task"]["payload"]) == (202, None)
