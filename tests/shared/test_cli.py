"""The `taskmesh` command against a gateway that follows a script."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from taskmesh import cli
from taskmesh.cli import inputs
from taskmesh.cli.failures import UsageError
from taskmesh.cli.output import ago, length
from taskmesh.cli.types import fields
from taskmesh.contracts.billing import IssueInvoice


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


def test_submit_takes_json_and_single_fields(taskmesh, gateway):
    gateway.will(gateway.task(status=202))

    code, out, _ = taskmesh(
        "submit", "a.b", "--payload", '{"buyer": {"country": "DE"}}', "--set", "buyer.name=Ada", "--set", "lines.0.tax:={}",
        "--set", "lines.0.unit_price=10.00", "--delay", "5m", "--tag", "x", "--tag", "y", "--priority", "7",
        "--idempotency-key", "order-7",
    )  # fmt: skip

    assert code == 0
    assert gateway.task_id in out
    (asked,) = gateway.asked
    assert asked.headers["idempotency-key"] == "order-7"
    assert asked.body == {
        "type": "a.b",
        "payload": {"buyer": {"country": "DE", "name": "Ada"}, "lines": [{"tax": {}, "unit_price": "10.00"}]},
        "delay_seconds": 300.0,
        "priority": 7,
        "tags": ["x", "y"],
    }


def test_submit_reads_a_file_and_standard_input(taskmesh, gateway, tmp_path, monkeypatch):
    gateway.will(gateway.task(status=202))
    file = tmp_path / "payload.json"
    file.write_text('{"name": "Ελένη"}', encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"n": 1}'))

    taskmesh("submit", "a.b", "--payload", f"@{file}")
    taskmesh("submit", "a.b", "--payload", "-")

    assert [asked.body["payload"] for asked in gateway.asked] == [{"name": "Ελένη"}, {"n": 1}]


def test_submit_that_waits_fails_with_the_task(taskmesh, gateway):
    error = {"code": "rejected", "message": "the books are closed", "exception": "billing.Closed"}
    gateway.will(gateway.task("failed", error=error))

    code, out, _ = taskmesh("submit", "a.b", "--wait", "5s")

    assert code == 1
    assert "rejected: the books are closed (billing.Closed)" in out
    assert gateway.asked[0].headers["prefer"] == "wait=5"


def test_json_is_one_document(taskmesh, gateway):
    gateway.will(gateway.task("succeeded", result={"number": "2026-1"}, payload={"name": "Ελένη"}))

    code, out, _ = taskmesh("get", gateway.task_id, "--json")

    assert code == 0
    assert json.loads(out)["result"] == {"number": "2026-1"}
    assert "Ελένη" in out


def test_a_pipe_gets_whole_ids_and_no_colour(taskmesh, gateway):
    tasks = [gateway.task_json("failed", tags=["run-1", "a" * 60])]
    gateway.will(gateway.reply(body={"items": tasks, "next_cursor": None}))

    code, out, _ = taskmesh("list", "--state", "failed", "--type", "a.b", "--limit", "5")

    assert code == 0
    header, row = out.splitlines()
    assert header.split()[:3] == ["ID", "TYPE", "STATE"]
    assert row.split()[:3] == [gateway.task_id, "billing.invoice.issue", "failed"]
    assert "a" * 60 in row
    assert "\x1b" not in out
    assert gateway.asked[0].query == {"type": "a.b", "state": "failed", "limit": "5"}


def test_tail_of_one_task_shows_each_change(taskmesh, gateway):
    gateway.will(gateway.stream((1, "queued")), gateway.task(), gateway.stream((2, "running"), (3, "succeeded")))

    code, out, _ = taskmesh("tail", gateway.task_id)

    assert code == 0
    assert [line.split()[1:] for line in out.splitlines()] == [
        [state, gateway.task_id, "billing.invoice.issue"] for state in ("queued", "running", "succeeded")
    ]


def test_tail_for_programs_is_one_line_of_json_for_each_change(taskmesh, gateway):
    gateway.will(gateway.stream((1, "queued"), (2, "cancelled")))

    _, out, _ = taskmesh("tail", gateway.task_id, "--json")

    assert [json.loads(line)["state"] for line in out.splitlines()] == ["queued", "cancelled"]


def test_waiting_for_a_tree_shows_who_led_to_what(taskmesh, gateway):
    child = {
        **gateway.task_json("failed"),
        "id": gateway.child_id,
        "type": "billing.document.render",
        "parent_id": gateway.task_id,
    }
    gateway.will(gateway.task("succeeded"), gateway.reply(body={"items": [child, gateway.task_json("succeeded")]}))

    code, out, _ = taskmesh("wait", gateway.task_id, "--tree", "--timeout", "30s")

    assert code == 1
    rows = out.splitlines()[1:]
    assert rows[0].startswith("billing.invoice.issue")
    assert rows[1].startswith("  billing.document.render")


def test_a_wait_that_takes_too_long_has_an_exit_code_of_its_own(taskmesh, gateway):
    gateway.will(gateway.task("running"))

    code, _, err = taskmesh("wait", gateway.task_id, "--timeout", "100ms")

    assert code == 5
    assert f"taskmesh wait {gateway.task_id}" in err


def test_a_refusal_names_the_fields_on_standard_error(taskmesh, gateway):
    wrong = [{"pointer": "/payload/buyer/email", "detail": "is required"}]
    gateway.will(gateway.problem(422, "contract_violation", errors=wrong))

    code, out, err = taskmesh("submit", "a.b")

    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "taskmesh: what is wrong, and where (contract_violation, 422)",
        "  /payload/buyer/email: is required",
    ]


def test_an_unknown_type_leads_to_the_right_one(taskmesh, gateway):
    gateway.will(gateway.problem(404, "unknown_type", nearest=["billing.invoice.issue"]))

    code, _, err = taskmesh("submit", "billing.invoice.isue")

    assert code == 3
    assert "Did you mean billing.invoice.issue?" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "a.b", "--payload", "{"], "the payload is no JSON"),
        (["submit", "a.b", "--payload", "payload.json"], "a file is given as @file"),
        (["submit", "a.b", "--payload", "@nowhere.json"], "nowhere.json cannot be read"),
        (["submit", "a.b", "--payload", "[]"], "must be a JSON object"),
        (["submit", "a.b", "--set", "name"], "write name=text"),
        (["submit", "a.b", "--set", "lines.5.x=1"], "no such place"),
        (["submit", "a.b", "--delay", "soon"], "no length of time"),
        (["submit", "a.b", "--at", "tomorrow"], "no moment"),
        (["submit", "a.b", "--at", "2026-12-24T18:00Z", "--delay", "1s"], "not both"),
        (["get", "17"], "Invalid value"),
        (["schedules", "create", "nightly", "a.b"], "either --cron or --every"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(taskmesh, gateway, arguments, said):
    code, _, err = taskmesh(*arguments)

    assert code == 2
    assert said in err
    assert gateway.asked == []


def test_a_missing_variable_is_named(taskmesh, monkeypatch):
    monkeypatch.delenv("TASKMESH_API_KEY")

    code, _, err = taskmesh("list")

    assert code == 2
    assert err.startswith("taskmesh: TASKMESH_API_KEY is not set")


def test_a_type_is_shown_with_the_fields_of_its_payload(taskmesh, gateway):
    announced = {
        "type": "billing.invoice.issue",
        "service": "billing",
        "description": "Issue an invoice.",
        "payload_schema": IssueInvoice.model_json_schema(),
    }
    gateway.will(gateway.reply(body=announced), gateway.reply(body={"items": [announced]}))

    _, one, _ = taskmesh("types", "billing.invoice.issue")
    _, every, _ = taskmesh("types")

    rows = {line.split()[0]: line.split()[1:] for line in one.splitlines() if line.strip()}
    assert rows["buyer.email"][:2] == ["email", "yes"]
    assert rows["lines[].tax.category"][:3] == ["S", "|", "Z"]
    assert "like ^[A-Z]{2}$" in one
    assert all(not line.endswith(" ") for line in one.splitlines())
    assert rows["buyer.vat_id"][0] == "string?"
    assert every.splitlines()[1].split()[:2] == ["billing.invoice.issue", "billing"]


def test_a_schema_that_contains_itself_is_shown_to_a_depth():
    schema = {"$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}}}, "$ref": "#/$defs/N"}

    assert len(list(fields({**schema, **schema["$defs"]["N"]}))) < 20


def test_schedules_are_made_listed_and_deleted(taskmesh, gateway):
    stored = {
        "id": gateway.task_id,
        "name": "nightly",
        "type": "a.b",
        "cron": "30 2 * * *",
        "timezone": "Europe/Berlin",
    }
    gateway.will(gateway.reply(201, stored), gateway.reply(body={"items": [stored]}), gateway.reply(204))

    made, _, _ = taskmesh(
        "schedules", "create", "nightly", "a.b", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin"
    )
    listed, out, _ = taskmesh("schedules", "list")
    deleted, _, _ = taskmesh("schedules", "delete", gateway.task_id)

    assert (made, listed, deleted) == (0, 0, 0)
    assert gateway.asked[0].body == {
        "name": "nightly",
        "type": "a.b",
        "payload": {},
        "overlap": "allow",
        "cron": "30 2 * * *",
        "timezone": "Europe/Berlin",
    }
    assert "30 2 * * * (Europe/Berlin)" in out


def test_an_unreachable_gateway_ends_the_command_with_its_own_code(monkeypatch):
    monkeypatch.setattr("taskmesh.cli.tasks.PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("TASKMESH_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TASKMESH_API_KEY", "key")

    assert cli.run(["list"]) == 4


def test_the_installed_command_works(gateway):
    gateway.will(gateway.task("succeeded"))
    environment = {**os.environ, "TASKMESH_URL": gateway.url, "TASKMESH_API_KEY": "key"}
    code = "from taskmesh.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", code, "get", gateway.task_id],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout


def test_lengths_of_time_are_read_and_shown_as_people_write_them():
    now = datetime(2026, 11, 22, 12, tzinfo=UTC)

    assert inputs.duration("1h 30m") == timedelta(minutes=90)
    assert inputs.duration("90") == timedelta(seconds=90)
    assert inputs.moment("2026-12-24T18:00Z") == datetime(2026, 12, 24, 18, tzinfo=UTC)
    with pytest.raises(UsageError):
        inputs.duration("5 parsecs")
    assert ago(now - timedelta(seconds=3), now) == "3 s ago"
    assert ago(now + timedelta(hours=5), now) == "in 5 h"
    assert ago(datetime(2026, 1, 2, 12, tzinfo=UTC), now) == "2026-01-02"
    assert length(timedelta(milliseconds=42)) == "42 ms"
    assert length(timedelta(minutes=3)) == "3 min"
