"""Every line of a task's life names it in the same four fields, whichever process it comes from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pika
import pytest

from running_mesh import Mesh, running_mesh
from taskmesh import logs
from taskmesh.testing.waiting import eventually

ROLES = ("api", "relay", "projector", "scheduler")
TRACE_ID = re.compile("[0-9a-f]{32}")


@pytest.fixture(scope="module")
def mesh(postgres: str, rabbitmq: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(postgres, rabbitmq, tmp_path_factory.mktemp("mesh"), *ROLES) as mesh:
        mesh.wait_until_announced("orders.order.place")
        yield mesh


def lines_about(mesh: Mesh, task_id: str) -> list[dict[str, Any]]:
    return [line for line in mesh.log_lines() if line.get("task_id") == task_id]


def said(mesh: Mesh, task_id: str) -> set[tuple[str, str]]:
    """Which messages there are about a task, by role."""
    return {(line["role"], line["message"]) for line in lines_about(mesh, task_id)}


def is_named_throughout(mesh: Mesh, task_id: str) -> bool:
    """True if each line about the task has the four fields, and they agree."""
    lines = lines_about(mesh, task_id)
    [task] = mesh.gateway.rows("select type, trace_id from tasks where id = %s", task_id)
    assert {line["type"] for line in lines} == {task["type"]}
    assert {line["trace_id"] for line in lines} == {task["trace_id"]}
    assert all(isinstance(line["attempt"], int) for line in lines)
    unnamed = [line for line in mesh.log_lines() if task_id in str(line) and line.get("task_id") != task_id]
    assert not [line for line in unnamed if task_id not in line.get("task_ids", ())]
    return bool(TRACE_ID.fullmatch(task["trace_id"]))


def test_a_task_that_is_retried(mesh):
    """Its attempts differ in their number."""
    task_id = mesh.submit("orders.order.place", {"name": "Ada", "mode": "retry", "times": 1})
    mesh.gateway.outcome(task_id)

    eventually(lambda: ("worker", "task succeeded") in said(mesh, task_id))
    assert is_named_throughout(mesh, task_id)
    attempts = {line["message"]: line["attempt"] for line in lines_about(mesh, task_id)}
    assert attempts == {"task accepted": 0, "attempt failed; task will be retried": 1, "task succeeded": 2}


def test_a_task_that_fails(mesh):
    """The gateway accepts it, and a child of the worker's pool gives it up."""
    task_id = mesh.submit("orders.order.place", {"name": "Ada", "mode": "permanent"})
    mesh.gateway.outcome(task_id)

    eventually(lambda: said(mesh, task_id) == {("api", "task accepted"), ("worker", "task failed")})
    assert is_named_throughout(mesh, task_id)


def test_a_task_that_is_cancelled_by_force(mesh):
    """The gateway, the service's relay, the worker's parent and a child each have a word."""
    task_id = mesh.submit("orders.cancel.grind")
    eventually(lambda: (task := mesh.gateway.task(task_id)) and task["state"] == "running")

    mesh.http.post(f"/v1/tasks/{task_id}:cancel", json={"force": True}).raise_for_status()
    assert mesh.gateway.outcome(task_id)["state"] == "cancelled"

    expected = {
        ("api", "task accepted"),
        ("api", "cancellation asked for"),
        ("relay", "cancellation received"),
        ("worker", "running task killed: its cancellation is forced"),
        ("worker", "task cancelled"),
    }
    eventually(lambda: expected <= said(mesh, task_id))
    assert is_named_throughout(mesh, task_id)
    [asked] = [line for line in lines_about(mesh, task_id) if line["message"] == "cancellation asked for"]
    assert asked["current_trace_id"] != asked["trace_id"]


def test_a_task_that_kills_its_workers_until_it_is_dead(mesh):
    """Its messages reach the dead letters, are replayed, and put away."""
    task_id = mesh.submit("orders.plain.poison")
    mesh.gateway.outcome(task_id)
    [letter] = eventually(lambda: mesh.gateway.letters(task_id))
    replayed = mesh.http.post(f"/v1/dead-letters/{letter['id']}:replay").raise_for_status().json()["task"]["id"]
    [second] = eventually(lambda: mesh.gateway.letters(replayed))
    mesh.http.post(f"/v1/dead-letters/{second['id']}:discard").raise_for_status()

    expected = {
        ("api", "task accepted"),
        ("worker", "running task has lost its process"),
        ("worker", "task failed"),
        ("projector", "dead letter stored"),
    }
    eventually(lambda: expected <= said(mesh, task_id))
    eventually(lambda: {("api", "dead letter replayed"), ("api", "dead letter discarded")} <= said(mesh, replayed))
    assert is_named_throughout(mesh, task_id)
    assert is_named_throughout(mesh, replayed)


def test_a_message_that_is_no_task_of_the_service(mesh):
    """What can be read of it is said, and nothing that cannot be what it should be."""
    task_id = str(uuid4())
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"task": "orders.nobody.knows", "id": task_id, "retries": 2, "traceparent": traceparent, "lang": "py"}
    junk = {"task": "no type, but words", "id": "no id", "retries": "many", "traceparent": "none"}
    with pika.BlockingConnection(pika.URLParameters(mesh.orders.amqp_url)) as connection:
        for each in (headers, junk):
            properties = pika.BasicProperties(headers=each, content_type="application/json", content_encoding="utf-8")
            connection.channel().basic_publish("taskmesh.commands", "orders.nobody.knows", b"[[], {}, {}]", properties)

    eventually(lambda: ("projector", "dead letter stored") in said(mesh, task_id))
    assert ("worker", "message dead-lettered") in said(mesh, task_id)
    for line in lines_about(mesh, task_id):
        assert (line["type"], line["attempt"]) == ("orders.nobody.knows", 3)
        assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    eventually(lambda: len(bad := unreadable(mesh)) == 2 and bad)
    assert not [line for line in unreadable(mesh) if {"task_id", "type", "attempt"} & line.keys()]
    assert "no type, but words" not in str(mesh.log_lines())


def unreadable(mesh: Mesh) -> list[dict[str, Any]]:
    """What worker and projector say of the message that names no task."""
    messages = {"message dead-lettered", "dead letter stored"}
    return [line for line in mesh.log_lines() if line["message"] in messages and "task_id" not in line]


def test_a_task_that_a_schedule_submits(mesh):
    """The scheduler says so in the task's own trace."""
    schedule = {"name": "soon", "type": "orders.order.place", "payload": {"name": "Ada"}, "interval_seconds": 1}
    made = mesh.http.post("/v1/schedules", json=schedule).raise_for_status().json()
    [first] = eventually(
        lambda: mesh.gateway.rows("select id from tasks where schedule_id = %s order by id limit 1", made["id"])
    )
    task_id = str(first["id"])
    mesh.http.delete(f"/v1/schedules/{made['id']}").raise_for_status()
    mesh.gateway.outcome(task_id)

    eventually(lambda: said(mesh, task_id) == {("scheduler", "schedule fired"), ("worker", "task succeeded")})
    assert is_named_throughout(mesh, task_id)


def test_a_task_that_no_queue_takes(mesh):
    """The gateway's relay names it when it puts its message back."""
    binding = {"exchange": "taskmesh.commands", "queue": "orders", "routing_key": "orders.#"}
    with pika.BlockingConnection(pika.URLParameters(mesh.orders.amqp_url)) as connection:
        connection.channel().queue_unbind(**binding)
        task_id = mesh.submit("orders.order.place", {"name": "Ada"})
        eventually(lambda: ("relay", "messages put back") in said(mesh, task_id))
        connection.channel().queue_bind(**binding)
    assert mesh.gateway.outcome(task_id)["state"] == "succeeded"

    assert is_named_throughout(mesh, task_id)


def test_a_line_for_people_has_its_facts_after_its_message():
    """In a terminal each line is one, and its exception stands under it."""
    formatter = logs.ConsoleFormatter("worker")
    error = RuntimeError("a secret")
    facts = {"code": "bug", "reason": None, "task_ids": ["3", "4"], **logs.of_task("1", "a.b.c", 2)}
    record = logging.getLogger().makeRecord(
        "test", logging.ERROR, "", 0, "task failed", (), (RuntimeError, error, None), extra=facts
    )

    first, *rest = formatter.format(record).splitlines()

    said = r"ERROR   worker    task failed  code=bug task_ids=3,4 task_id=1 type=a\.b\.c attempt=2"
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} " + said, first)
    assert rest[0] == "RuntimeError"
    assert not [line for line in rest if "a secret" in line]


def test_a_line_about_many_tasks_names_the_first_of_them():
    """However many there are, it stays a line."""
    assert logs.of_tasks(range(1000)) == {"task_ids": [str(number) for number in range(logs.IDS_LOGGED)]}
