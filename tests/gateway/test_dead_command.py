"""`taskmesh dead` and the client behind it, against the real gateway."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy import select

from gateway.projector import Projector
from taskmesh import cli, client
from taskmesh.celery_protocol import TaskMessage
from taskmesh.client import AsyncTaskmesh, Taskmesh
from taskmesh.outbox import outbox

from .test_diagnosing import dead

TYPE = "greeter.person.greet"


def greeting(**fields: Any) -> TaskMessage:
    return TaskMessage(**({"type": TYPE, "id": uuid4(), "payload": {"name": "Ada"}} | fields))


@pytest_asyncio.fixture
async def projector(api) -> Projector:
    return Projector(api.engine)


@pytest_asyncio.fixture
async def mesh(api) -> AsyncIterator[AsyncTaskmesh]:
    async with AsyncTaskmesh(api.url, api.key) as connected:
        yield connected


@pytest.fixture
def taskmesh(api, monkeypatch, capsys):
    """Runs one command line; returns its exit code and what it wrote."""
    monkeypatch.setenv("TASKMESH_URL", api.url)
    monkeypatch.setenv("TASKMESH_API_KEY", api.key)

    async def run(*arguments: object) -> tuple[int, str, str]:
        code = await asyncio.to_thread(cli.run, ["dead", *map(str, arguments)])
        wrote = capsys.readouterr()
        return code, wrote.out, wrote.err

    return run


class Person(io.StringIO):
    """Standard input with a person at it."""

    def isatty(self) -> bool:
        return True


async def sent(api) -> int:
    async with api.engine.connect() as connection:
        return len((await connection.execute(select(outbox))).all())


async def test_the_client_lists_groups_shows_replays_and_discards(mesh, projector):
    await projector.handle([dead(greeting()), dead(greeting()), dead(greeting(payload={})), dead(body=b"\xff")])
    letters = mesh.dead_letters

    found = [letter async for letter in letters.list(page_size=2, code="rejected")]
    groups = await letters.groups()
    broken = await letters.get(groups[1].sample_id)
    replayed = await letters.replay(found[0].id)
    with pytest.raises(client.Conflict) as twice:
        await letters.replay(found[0].id)
    with pytest.raises(client.PayloadRefused):
        await letters.replay((await anext(letters.list(code="contract_violation"))).id)
    discarded = await letters.discard(found[1].id, note="done by hand")
    plan = await letters.replay_many(dry_run=True, rate_per_second=5, service="greeter")
    put_away = await letters.discard_many(service="greeter", limit=1)

    assert (len(found), [group.count for group in groups]) == (2, [2, 1, 1])
    assert broken.body.base64 or broken.body.text
    assert replayed.task is not None
    assert str(replayed.task.id) in twice.value.detail
    assert (discarded.state, discarded.resolution_note) == ("discarded", "done by hand")
    assert (plan.matched, plan.replayed, {reason.code for reason in plan.reasons}) == (
        2,
        0,
        {"contract_violation", "unreadable"},
    )
    assert put_away.discarded == 1


async def test_the_ordinary_client_does_the_same(api, projector):
    await projector.handle([dead(greeting()), dead(greeting())])

    def use() -> tuple[int, int, int]:
        with Taskmesh(api.url, api.key) as mesh:
            [first, _] = mesh.dead_letters.list(state="open")
            mesh.dead_letters.get(first.id)
            mesh.dead_letters.discard(first.id)
            done = mesh.dead_letters.replay_many(service="greeter")
            return mesh.dead_letters.groups(state=None)[0].count, done.replayed, done.refused

    assert await asyncio.to_thread(use) == (2, 1, 0)


async def test_list_and_groups_are_tables_of_open_letters(taskmesh, projector):
    await projector.handle([dead(greeting(payload={})), dead(body=b"?")])

    _, listed, _ = await taskmesh("list", "--code", "contract_violation", "--since", "1h")
    _, grouped, _ = await taskmesh("groups")
    _, nothing, _ = await taskmesh("list", "--state", "discarded")
    _, as_json, _ = await taskmesh("list", "--json", "--limit", 1)

    assert "/payload/name is required" in listed
    assert "malformed" not in listed
    assert "body is not JSON" in grouped
    assert "no dead letters" in nothing
    assert len(json.loads(as_json)) == 1


async def test_show_has_the_payload_and_the_history(taskmesh, projector):
    message = greeting()
    await projector.handle([dead(message)])
    [letter] = json.loads((await taskmesh("list", "--json"))[1])

    code, out, _ = await taskmesh("show", letter["id"])

    assert code == 0
    assert '"name": "Ada"' in out
    assert str(message.id) in out
    assert "failed" in out


async def test_a_letter_is_replayed_with_a_mended_payload(taskmesh, projector, tmp_path, monkeypatch, api):
    await projector.handle([dead(greeting(payload={})), dead(body=b"?", headers={"id": "x", "task": 1})])
    by_code = {letter["code"]: letter for letter in json.loads((await taskmesh("list", "--json"))[1])}
    unreadable, broken = by_code["malformed"], by_code["contract_violation"]
    mended = tmp_path / "mended.json"
    mended.write_text('{"name": "Grace"}')

    refused = await taskmesh("replay", broken["id"])
    replayed = await taskmesh("replay", broken["id"], "--payload", mended, "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"name": "Ada"}'))
    named = await taskmesh("replay", unreadable["id"], "--payload", "-", "--as", TYPE)

    assert (refused[0], "/payload/name" in refused[2]) == (3, True)
    assert json.loads(replayed[1])["task"]["payload"] == {"name": "Grace"}
    assert (named[0], await sent(api)) == (0, 2)


async def test_many_are_replayed_only_after_a_yes(taskmesh, projector, api, monkeypatch):
    await projector.handle([dead(greeting()) for _ in range(3)])
    [group] = json.loads((await taskmesh("groups", "--json"))[1])
    choice = ("replay", "--group", group["fingerprint"], "--rate", 2)

    planned = await taskmesh(*choice, "--dry-run")
    unasked = await taskmesh(*choice)
    monkeypatch.setattr("sys.stdin", Person("n\n"))
    declined = await taskmesh(*choice)
    before = await sent(api)
    monkeypatch.setattr("sys.stdin", Person("y\n"))
    accepted = await taskmesh(*choice)

    assert "3 of 3" in planned[1]
    assert (unasked[0], "--yes" in unasked[2]) == (2, True)
    assert (declined[0], before) == (1, 0)
    assert (accepted[0], await sent(api)) == (0, 3)


async def test_many_are_discarded_with_a_note(taskmesh, projector):
    await projector.handle([dead(greeting()) for _ in range(2)])

    code, out, _ = await taskmesh("discard", "--type", TYPE, "--note", "a test", "--yes")
    [one, _] = json.loads((await taskmesh("list", "--state", "discarded", "--json"))[1])

    assert (code, "2 of 2" in out, one["resolution_note"]) == (0, True, "a test")


@pytest.mark.parametrize(
    "words",
    [
        ["replay"],
        ["discard"],
        ["replay", "1", "--all"],
        ["replay", "--all", "--payload", "{}"],
        ["replay", "1", "--dry-run"],
    ],
)
async def test_a_choice_that_is_none_or_two_is_refused(taskmesh, words):
    assert (await taskmesh(*words))[0] == 2


async def test_what_a_stranger_has_written_cannot_command_the_terminal(taskmesh, mesh, projector):
    evil = "\x1b]0;owned\x07\x1b[31m\x9b2J"
    await projector.handle([dead(headers={"task": f"greeter.{evil}.greet"}, body=f"no JSON {evil}".encode())])
    [letter] = [one async for one in mesh.dead_letters.list()]

    _, out, _ = await taskmesh("show", letter.id)

    assert "no JSON ␛]0;owned" in out
    assert not set(out) & {"\x1b", "\x07", "\x9b"}


@pytest.mark.parametrize("command", ["list", "groups"])
async def test_a_list_shows_nothing_that_a_stranger_has_written(taskmesh, projector, command):
    """What is no name of a type is not shown for one."""
    await projector.handle([dead(headers={"task": "a secret"}, body=b"no JSON, but a secret")])

    _, out, _ = await taskmesh(command)

    assert "greeter" in out
    assert "a secret" not in out
