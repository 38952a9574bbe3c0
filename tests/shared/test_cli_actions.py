"""`taskmesh cancel`, `retry`, `explain` and `services` against a gateway that follows a script."""

from __future__ import annotations

import json

import pytest

from taskmesh import cli


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


def cancelling(gateway, outcome, state, status=200):
    body = {"outcome": outcome, "detail": "One sentence.", "task": gateway.task_json(state)}
    return gateway.reply(status, body)


@pytest.mark.parametrize(
    ("outcome", "state", "code"),
    [
        ("cancelled", "cancelled", 0),
        ("requested", "running", 0),
        ("already_finished", "cancelled", 0),
        ("already_finished", "succeeded", 1),
        ("too_late", "failed", 1),
    ],
)
def test_cancel_says_what_became_of_it(taskmesh, gateway, outcome, state, code):
    gateway.will(cancelling(gateway, outcome, state))

    found, out, _ = taskmesh("cancel", gateway.task_id, "--reason", "a mistake")

    assert found == code
    assert outcome in out
    assert "One sentence." in out
    assert gateway.asked[0].body == {"reason": "a mistake"}


def test_cancel_that_waited_in_vain_says_so(taskmesh, gateway):
    gateway.will(cancelling(gateway, "requested", "running", status=202))

    code, _, _ = taskmesh("cancel", gateway.task_id, "--wait", "1s", "--force")

    assert code == 5
    assert (gateway.asked[0].headers["prefer"], gateway.asked[0].body) == ("wait=1", {"force": True})


def test_cancel_where_force_is_refused(taskmesh, gateway):
    gateway.will(gateway.problem(409, "force_not_allowed"))

    code, _, err = taskmesh("cancel", gateway.task_id, "--force")

    assert code == 3
    assert "force_not_allowed" in err


def test_retry_shows_the_new_task(taskmesh, gateway):
    gateway.will(gateway.task(status=202, retry_of=gateway.child_id))

    code, out, _ = taskmesh("retry", gateway.child_id, "--payload", '{"n": 1}')

    assert code == 0
    assert f"retry of  {gateway.child_id}" in out
    assert gateway.asked[0].body == {"payload": {"n": 1}}


def test_retry_as_it_was_sends_no_payload(taskmesh, gateway):
    gateway.will(gateway.task(status=202))

    taskmesh("retry", gateway.child_id)

    assert gateway.asked[0].body == {}


def test_explain_shows_reason_advice_and_facts(taskmesh, gateway):
    explanation = {
        "task_id": gateway.task_id,
        "state": "queued",
        "reason": "no_consumers",
        "summary": "No worker takes from billing, where 7 messages wait.",
        "advice": "Start workers of billing.",
        "next_at": None,
        "facts": {"queue": {"ready": 7}},
        "observed_at": "2026-11-22T10:00:00Z",
    }
    gateway.will(gateway.reply(body=explanation))

    code, out, _ = taskmesh("explain", gateway.task_id)
    _, document, _ = taskmesh("explain", gateway.task_id, "--json")

    assert code == 0
    for expected in ("no_consumers", explanation["summary"], explanation["advice"], '"ready": 7'):
        assert expected in out
    assert json.loads(document)["facts"] == {"queue": {"ready": 7}}


class TestServices:
    service = {  # noqa: RUF012 - never changed
        "service": "billing",
        "release": "1.2",
        "announced_at": "2026-11-22T10:00:00Z",
        "types": 4,
        "paused_at": "2026-11-22T10:00:00Z",
        "pause_reason": "migration",
        "queues": [
            {"queue": name, "ready": 3, "unacknowledged": 1, "consumers": 2, "observed_at": "2026-11-22T10:00:00Z"}
            for name in ("billing", "billing.events")
        ],
    }

    def test_list_shows_a_line_for_each(self, taskmesh, gateway):
        gateway.will(gateway.reply(body={"items": [self.service]}))

        code, out, _ = taskmesh("services", "list")

        _, row = out.splitlines()
        assert code == 0
        assert row.split()[:3] == ["billing", "1.2", "4"]
        assert "6" in row.split()
        assert "migration" in row

    @pytest.mark.parametrize("verb", ["pause", "resume"])
    def test_pause_and_resume_are_told_to_the_gateway(self, taskmesh, gateway, verb):
        gateway.will(gateway.reply(body=self.service))

        code, out, _ = taskmesh("services", verb, "billing")

        assert code == 0
        assert "billing" in out
        assert (gateway.asked[0].method, gateway.asked[0].path) == ("POST", f"/v1/services/billing:{verb}")

    def test_a_pause_has_its_reason(self, taskmesh, gateway):
        gateway.will(gateway.reply(body=self.service))

        taskmesh("services", "pause", "billing", "--reason", "migration")

        assert gateway.asked[0].body == {"reason": "migration"}
