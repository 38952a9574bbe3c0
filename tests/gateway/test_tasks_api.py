"""The contract of `/v1/tasks`."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select

from gateway import ledger
from gateway.models import task_events, tasks
from gateway.scopes import Scope
from taskmesh import celery_protocol
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.contracts.manifest import Manifest, TypeManifest
from taskmesh.outbox import outbox

TYPE = "greeter.person.greet"
REQUEST = {"type": TYPE, "payload": {"name": "Ada"}}


def happened(view: dict[str, Any], state: TaskState, **fields: Any) -> LifecycleEvent:
    """What a worker says of the task."""
    values = {"at": datetime.now(UTC), "service": "greeter", "type": view["type"]} | fields
    return LifecycleEvent(task_id=UUID(view["id"]), state=state, **values)


async def advance(api, *events: LifecycleEvent) -> None:
    async with api.engine.begin() as connection:
        await ledger.advance(connection, events)


async def count(api, table) -> int:
    async with api.engine.connect() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def test_an_accepted_task_is_in_the_ledger_and_its_message_in_the_outbox(api):
    """202 comes after one commit that holds the task, its timeline and its message."""
    response = await api.http.post("/v1/tasks", json=REQUEST | {"priority": 7, "tags": ["nightly"]})

    view = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/tasks/{view['id']}"
    assert {name: view[name] for name in ("state", "attempt", "service", "payload", "priority", "tags", "root_id")} == {
        "state": "queued",
        "attempt": 0,
        "service": "greeter",
        "payload": {"name": "Ada"},
        "priority": 7,
        "tags": ["nightly"],
        "root_id": view["id"],
    }
    assert view["created_at"].endswith("Z")
    async with api.engine.connect() as connection:
        row = (await connection.execute(select(outbox))).one()
    message = celery_protocol.decode(row.headers, row.properties, bytes(row.body))
    assert (row.exchange, row.routing_key, row.mandatory) == ("taskmesh.commands", TYPE, True)
    assert (str(message.id), message.payload, message.priority) == (view["id"], {"name": "Ada"}, 7)
    assert row.due_at == row.created_at
    assert await count(api, task_events) == 1


async def test_an_accepted_task_can_be_read_as_it_was_answered(api):
    accepted = await api.submit(tags=["a"], priority=0)

    read = await api.http.get(f"/v1/tasks/{accepted['id']}")

    assert read.json() == accepted


async def test_the_callers_trace_goes_into_the_task_and_its_message(api):
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    response = await api.http.post(
        "/v1/tasks", json=REQUEST, headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    )

    async with api.engine.connect() as connection:
        headers = (await connection.execute(select(outbox.c.headers))).scalar_one()
    assert response.json()["trace_id"] == response.headers["taskmesh-trace-id"] == trace_id
    assert headers["traceparent"].split("-")[1] == trace_id


async def test_requests_of_one_connection_have_traces_of_their_own(api):
    """A body that comes in pieces resumes the connection from within its request, and must not leave its trace there."""
    large = REQUEST | {"payload": {"name": "x" * 100_000}}

    answers = [await api.http.post("/v1/tasks", json=body) for body in (large, REQUEST, REQUEST, large, REQUEST)]

    assert len({answer.headers["taskmesh-trace-id"] for answer in answers}) == len(answers)


async def test_a_task_without_a_callers_trace_gets_one(api):
    view = await api.submit()

    assert len(view["trace_id"]) == 32


@pytest.mark.parametrize("when", [{"delay_seconds": 3600}, {"run_at": "2999-01-01T00:00:00+02:00"}])
async def test_delayed_work_is_scheduled_and_its_message_waits(api, when):
    view = await api.submit(**when)

    async with api.engine.connect() as connection:
        due_at = (await connection.execute(select(outbox.c.due_at))).scalar_one()
    assert view["state"] == "scheduled"
    assert view["queued_at"] is None
    assert datetime.fromisoformat(view["due_at"]) == due_at > datetime.now(UTC)


async def test_a_time_in_the_past_is_at_once(api):
    view = await api.submit(run_at="2001-01-01T00:00:00Z")

    assert view["state"] == "queued"


async def test_the_relays_hook_turns_a_scheduled_task_into_a_queued_one(api):
    view = await api.submit(delay_seconds=60)

    async with api.engine.begin() as connection:
        changed = await ledger.mark_queued(connection, [UUID(view["id"])], at=datetime.now(UTC))
        again = await ledger.mark_queued(connection, [UUID(view["id"])], at=datetime.now(UTC))

    read = (await api.http.get(f"/v1/tasks/{view['id']}")).json()
    assert (len(changed), again) == (1, [])
    assert (read["state"], read["attempt"]) == ("queued", 0)
    assert read["queued_at"] is not None


async def test_a_task_that_was_not_published_in_time_is_expired(api):
    view = await api.submit(delay_seconds=60)

    async with api.engine.begin() as connection:
        await ledger.mark_expired(connection, [UUID(view["id"])], at=datetime.now(UTC))

    read = (await api.http.get(f"/v1/tasks/{view['id']}")).json()
    assert (read["state"], read["attempt"]) == ("expired", 0)
    assert read["finished_at"] is not None


class TestIdempotency:
    async def test_one_key_from_fifty_threads_at_once_is_one_task_and_one_answer(self, api):
        def post(_: int) -> httpx.Response:
            headers = {"Authorization": f"Bearer {api.key}", "Idempotency-Key": "order-1"}
            return httpx.post(f"{api.url}/v1/tasks", json=REQUEST, headers=headers, timeout=30)

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(50) as threads:
            responses = await asyncio.gather(*(loop.run_in_executor(threads, post, index) for index in range(50)))

        assert {response.status_code for response in responses} == {202}
        assert len({response.content for response in responses}) == 1
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
        assert [await count(api, table) for table in (tasks, outbox, task_events)] == [1, 1, 1]

    async def test_a_repetition_gets_the_first_answer_whatever_has_become_of_the_task(self, api):
        headers = {"Idempotency-Key": "order-2"}
        first = await api.http.post("/v1/tasks", json=REQUEST, headers=headers)
        await advance(api, happened(first.json(), TaskState.SUCCEEDED, result={"ok": 1}))

        again = await api.http.post("/v1/tasks", json=dict(reversed(REQUEST.items())), headers=headers)

        assert again.content == first.content
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]

    async def test_the_same_key_for_another_request_is_a_conflict(self, api):
        headers = {"Idempotency-Key": "order-3"}
        await api.http.post("/v1/tasks", json=REQUEST, headers=headers)

        other = await api.http.post("/v1/tasks", json=REQUEST | {"priority": 1}, headers=headers)

        assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
        assert await count(api, tasks) == 1

    async def test_a_key_belongs_to_the_caller_who_used_it(self, api):
        headers = {"Idempotency-Key": "order-4"}
        mine = await api.http.post("/v1/tasks", json=REQUEST, headers=headers)

        other_key = await api.new_key(Scope.TASKS_WRITE)
        theirs = await api.http.post(
            "/v1/tasks", json=REQUEST, headers={**headers, "Authorization": f"Bearer {other_key}"}
        )

        assert mine.json()["id"] != theirs.json()["id"]

    async def test_a_refused_request_does_not_use_its_key_up(self, api):
        headers = {"Idempotency-Key": "order-5"}
        bad = await api.http.post("/v1/tasks", json=REQUEST | {"payload": {}}, headers=headers)

        good = await api.http.post("/v1/tasks", json=REQUEST, headers=headers)

        assert (bad.status_code, good.status_code) == (422, 202)

    async def test_what_was_accepted_once_is_answered_again_though_its_type_has_changed_since(self, api):
        """A worker's release between a request and its repetition must not turn a 202 into a refusal."""
        before = {}
        for path, body in (("/v1/tasks", REQUEST), ("/v1/tasks:batchCreate", {"tasks": [REQUEST] * 30})):
            before[path] = await api.http.post(path, json=body, headers={"Idempotency-Key": path})
        stricter = TypeManifest(
            type=TYPE, kind=TaskKind.COMMAND, queue="greeter", payload_schema={"required": ["title"]}
        )
        await api.announce(Manifest(service="greeter", release="2", types=(stricter,), announced_at=datetime.now(UTC)))
        api.app.state.gateway.catalogue._read_at = float("-inf")

        for path, body in (("/v1/tasks", REQUEST), ("/v1/tasks:batchCreate", {"tasks": [REQUEST] * 30})):
            again = await api.http.post(path, json=body, headers={"Idempotency-Key": path})
            new = await api.http.post(path, json=body, headers={"Idempotency-Key": "another"})

            assert (again.status_code, again.content) == (202, before[path].content)
            assert again.headers["idempotent-replayed"] == "true"
            assert new.status_code == 422

    async def test_a_caller_who_hangs_up_before_the_answer_finds_it_under_the_key(self, api, eventually):
        """The request is dealt with to its end: the task is accepted, and accepted once."""
        headers = {"Idempotency-Key": "order-6"}
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                await api.http.post("/v1/tasks", json=REQUEST, headers=headers | {"Prefer": "wait=30"}, timeout=0.2)

        again = await api.http.post("/v1/tasks", json=REQUEST, headers=headers)

        assert again.headers["idempotent-replayed"] == "true"
        assert [await count(api, table) for table in (tasks, outbox, task_events)] == [1, 1, 1]

    async def test_a_batch_is_repeated_as_a_whole(self, api):
        batch = {"tasks": [REQUEST, REQUEST]}
        first = await api.http.post("/v1/tasks:batchCreate", json=batch, headers={"Idempotency-Key": "batch"})

        again = await api.http.post("/v1/tasks:batchCreate", json=batch, headers={"Idempotency-Key": "batch"})

        assert again.content == first.content
        assert await count(api, tasks) == 2


class TestBatches:
    async def test_a_batch_is_accepted_in_the_order_in_which_it_was_sent(self, api):
        requests = [REQUEST | {"payload": {"name": f"n{index}"}} for index in range(500)]

        response = await api.http.post("/v1/tasks:batchCreate", json={"tasks": requests})

        views = response.json()["items"]
        assert response.status_code == 202
        assert [view["payload"]["name"] for view in views] == [f"n{index}" for index in range(500)]
        assert [await count(api, table) for table in (tasks, outbox, task_events)] == [500, 500, 500]

    async def test_one_bad_task_refuses_the_batch_and_is_pointed_at(self, api):
        response = await api.http.post(
            "/v1/tasks:batchCreate", json={"tasks": [REQUEST, REQUEST | {"payload": {"name": "", "times": 0}}]}
        )

        found = {error["pointer"] for error in response.json()["errors"]}
        assert (response.status_code, found) == (422, {"/tasks/1/payload/name", "/tasks/1/payload/times"})
        assert await count(api, tasks) == 0

    async def test_an_unknown_type_in_a_batch_is_pointed_at(self, api):
        response = await api.http.post("/v1/tasks:batchCreate", json={"tasks": [REQUEST, REQUEST | {"type": "x.y.z"}]})

        assert response.json()["errors"][0]["pointer"] == "/tasks/1/type"

    @pytest.mark.parametrize("length", [0, 501])
    async def test_a_batch_has_1_to_500_tasks(self, api, length):
        response = await api.http.post("/v1/tasks:batchCreate", json={"tasks": [REQUEST] * length})

        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/tasks")


class TestLists:
    async def test_pages_are_complete_and_without_repetition_while_tasks_arrive(self, api):
        before = [(await api.submit())["id"] for _ in range(23)]

        seen: list[str] = []
        cursor = None
        while True:
            query = {"limit": 5} | ({"cursor": cursor} if cursor else {})
            page = (await api.http.get("/v1/tasks", params=query)).json()
            seen += [item["id"] for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
            await api.submit()

        assert seen == list(reversed(before))

    async def test_tasks_of_one_moment_are_told_apart_by_their_ids(self, api):
        moment = datetime.now(UTC)
        new = [
            ledger.NewTask(type=TYPE, service="greeter", payload={}, created_at=moment, id=uuid4()) for _ in range(9)
        ]
        async with api.engine.begin() as connection:
            await ledger.submit(connection, new)

        first = (await api.http.get("/v1/tasks", params={"limit": 4})).json()
        rest = (await api.http.get("/v1/tasks", params={"limit": 200, "cursor": first["next_cursor"]})).json()

        ids = [item["id"] for item in first["items"] + rest["items"]]
        assert ids == sorted((str(task.id) for task in new), reverse=True)

    async def test_the_last_page_has_no_cursor(self, api):
        for _ in range(3):
            await api.submit()

        page = (await api.http.get("/v1/tasks", params={"limit": 3})).json()

        assert (len(page["items"]), page["next_cursor"]) == (3, None)

    async def test_each_filter_finds_its_tasks(self, api):
        root = await api.submit(tags=["red", "blue"])
        failed = await api.submit(tags=["red"])
        await advance(
            api,
            happened(failed, TaskState.FAILED, failure=TaskFailure(code="exception", message="no")),
            LifecycleEvent(
                task_id=uuid4(),
                type="email.message.send",
                state=TaskState.RUNNING,
                at=datetime.now(UTC),
                service="email",
                root_id=UUID(root["id"]),
                parent_id=UUID(root["id"]),
            ),
        )

        async def found(**query: Any) -> list[str]:
            items = (await api.http.get("/v1/tasks", params=query)).json()["items"]
            return sorted(item["type"] + "/" + item["state"] for item in items)

        queued, broken, child = f"{TYPE}/queued", f"{TYPE}/failed", "email.message.send/running"
        assert await found(type=TYPE) == [broken, queued]
        assert await found(state="failed") == [broken]
        assert await found(state="succeeded") == []
        assert await found(tag="red") == [broken, queued]
        assert await found(tag="blue") == [queued]
        assert await found(root_id=root["id"]) == [child, queued]
        assert await found(parent_id=root["id"]) == [child]
        assert await found(created_after=failed["created_at"]) == [child]
        assert await found(created_before=failed["created_at"]) == [queued]
        assert await found(created_before=datetime.now(UTC) - timedelta(days=1)) == []

    @pytest.mark.parametrize(
        "query",
        [
            {"cursor": "nonsense"},
            {"cursor": "bnVsbA"},  # null
            {"cursor": "WzEsMl0"},  # [1,2]
            {"cursor": "W251bGwsbnVsbF0"},  # [null,null]
            {"limit": 0},
            {"limit": 201},
            {"state": "gone"},
            {"colour": "red"},
            {"type": "a\x00"},
            {"tag": "\x00"},
            {"created_after": "5"},
        ],
    )
    async def test_a_query_that_cannot_be_read_is_a_problem(self, api, query):
        response = await api.http.get("/v1/tasks", params=query)

        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert response.json()["errors"][0]["pointer"] == f"/query:{next(iter(query))}"


class TestWaiting:
    async def test_a_submission_that_waits_is_answered_with_the_finished_task(self, api):
        waiting = asyncio.create_task(
            api.http.post("/v1/tasks", json=REQUEST, headers={"Prefer": "respond-async, wait=20"})
        )
        view = await _first_task(api)
        await advance(api, happened(view, TaskState.SUCCEEDED, attempt=1, result={"greeting": "Hello"}))

        response = await waiting

        assert (response.status_code, response.headers["preference-applied"]) == (200, "wait=20")
        assert response.json()["result"] == {"greeting": "Hello"}
        assert response.elapsed < timedelta(seconds=2)

    async def test_a_submission_that_waited_in_vain_is_accepted_all_the_same(self, api):
        response = await api.http.post("/v1/tasks", json=REQUEST, headers={"Prefer": "wait=1"})

        assert (response.status_code, response.json()["state"]) == (202, "queued")

    async def test_a_reader_can_wait_too(self, api):
        view = await api.submit()
        waiting = asyncio.create_task(api.http.get(f"/v1/tasks/{view['id']}", headers={"Prefer": "wait=20"}))
        await advance(api, happened(view, TaskState.RUNNING))
        await advance(api, happened(view, TaskState.FAILED, failure=TaskFailure(code="exception", message="broken")))

        response = await waiting

        assert response.json()["state"] == "failed"
        assert response.json()["error"] == {"code": "exception", "message": "broken", "exception": None}

    async def test_nobody_waits_for_a_finished_task(self, api):
        view = await api.submit()
        await advance(api, happened(view, TaskState.SUCCEEDED))

        response = await api.http.get(f"/v1/tasks/{view['id']}", headers={"Prefer": "wait=60"})

        assert response.elapsed < timedelta(seconds=2)

    async def test_who_waits_is_answered_as_things_stand_when_the_process_stops(self, api, eventually):
        view = await api.submit()
        waiting = asyncio.create_task(api.http.get(f"/v1/tasks/{view['id']}", headers={"Prefer": "wait=60"}))
        await eventually(lambda: api.app.state.gateway.doorbell._waiting)

        api.app.state.gateway.doorbell.stop()

        assert (await waiting).json()["state"] == "queued"


async def _first_task(api) -> dict[str, Any]:
    while True:
        items = (await api.http.get("/v1/tasks")).json()["items"]
        if items:
            return items[0]
        await asyncio.sleep(0.02)
