"""`taskmesh reconcile` against a gateway that follows a script."""

from __future__ import annotations

import json

import pytest

from taskmesh import cli
from taskmesh.cli import reconcile


@pytest.fixture
def taskmesh(gateway, monkeypatch, capsys):
    """Runs one command line; returns its exit code and what it wrote."""
    monkeypatch.setenv("TASKMESH_URL", gateway.url)
    monkeypatch.setenv("TASKMESH_API_KEY", "key-of-ada")

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        wrote = capsys.readouterr()
        return code, wrote.out, wrote.err

    return run


def answer(gateway, *, named=False, **numbers):
    audit = {
        "id": 7,
        "started_at": "2026-11-22T10:00:00Z",
        "finished_at": "2026-11-22T10:00:01Z",
        **dict.fromkeys(("accepted", "waiting", "running", "finished", "dead", "unaccounted"), 0),
        **numbers,
    }
    task = {
        "task_id": gateway.task_id,
        "type": "billing.invoice.issue",
        "service": "billing",
        "since": "2026-11-22T09:58:00Z",
        "last_seen_at": "2026-11-22T09:57:00Z",
        "last_seen_where": "ledger: queued",
        "redrives": 2,
    }
    return gateway.reply(200, {"audit": audit, "unaccounted": [task] if named else []})


def test_a_balance_without_unaccounted_tasks_is_well(taskmesh, gateway):
    gateway.will(answer(gateway, accepted=12, finished=10, waiting=2))

    code, out, _ = taskmesh("reconcile")

    assert (code, gateway.asked[0].method, gateway.asked[0].path) == (0, "GET", "/v1/reconciliation")
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["accepted", "12"],
        ["waiting", "2"],
        ["running", "0"],
    ]


def test_an_unaccounted_task_is_named_with_its_last_sighting(taskmesh, gateway):
    gateway.will(answer(gateway, accepted=1, unaccounted=1, named=True))

    code, out, _ = taskmesh("reconcile")

    assert code == 1
    assert gateway.task_id in out
    assert "ledger: queued" in out
    assert "2 times" in out


def test_what_could_not_be_judged_is_said_and_is_no_loss(taskmesh, gateway):
    gateway.will(answer(gateway, accepted=3, waiting=3, unknown={"broker_unreachable": 3}))

    code, out, _ = taskmesh("reconcile")

    assert code == 0
    assert "3 could not be judged: the broker cannot be reached." in out


def test_without_any_audit_nothing_is_well(taskmesh, gateway):
    gateway.will(gateway.reply(200, {"audit": None, "unaccounted": []}))
    code, out, _ = taskmesh("reconcile")
    assert code == 1
    assert "No audit yet" in out


def test_run_asks_for_an_audit_of_young_tasks_too(taskmesh, gateway):
    gateway.will(answer(gateway))

    code, out, _ = taskmesh("reconcile", "--run", "--grace", "0s", "--json")

    assert (code, json.loads(out)["audit"]["id"]) == (0, 7)
    assert (gateway.asked[0].path, gateway.asked[0].body) == ("/v1/reconciliation:run", {"grace_seconds": 0.0})


def test_wait_audits_until_nothing_is_in_doubt(taskmesh, gateway, monkeypatch):
    monkeypatch.setattr(reconcile, "PAUSE_SECONDS", 0.0)
    gateway.will(
        answer(gateway, accepted=1, waiting=1, suspected=1),
        answer(gateway, accepted=1, unaccounted=1, redriven=1, named=True),
        answer(gateway, accepted=1, finished=1),
    )

    code, _, _ = taskmesh("reconcile", "--wait", "30s")

    assert (code, len(gateway.asked)) == (0, 3)


def test_grace_is_for_an_audit_of_its_own(taskmesh):
    code, _, err = taskmesh("reconcile", "--grace", "0s")
    assert code == 2
    assert "--grace needs --run or --wait" in err
