"""`taskmesh verify`, pointed at a service of which some tasks are idempotent and some are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from taskmesh.management import Management
from taskmesh.testing.waiting import eventually
from taskmesh.verify import effects, plan
from taskmesh.verify.plan import PlanMistake

SERVICES = Path(__file__).parents[1] / "services"

# Four workers are started for each type.
pytestmark = pytest.mark.timeout(600)


@dataclass
class Verified:
    """What one command said."""

    exit_code: int
    report: dict[str, Any]
    said: str

    def __getitem__(self, name: str) -> dict[str, Any]:
        return next(each for each in self.report["types"] if each["type"] == name)

    def verdicts(self, name: str) -> dict[str, str]:
        return {finding["way"]: finding["verdict"] for finding in self[name]["findings"]}

    def details(self, name: str, way: str) -> list[str]:
        return next(finding["details"] for finding in self[name]["findings"] if finding["way"] == way)


@pytest.fixture(scope="module")
def environment(postgres: str, rabbitmq: Any) -> dict[str, str]:
    """The command uses the servers of this run of tests; nothing else of ours must reach the service."""
    return {
        **os.environ,
        "PYTHONPATH": str(SERVICES),
        "TASKMESH_TEST_DATABASE_URL": postgres,
        "TASKMESH_TEST_AMQP_URL": rabbitmq.amqp_url,
        "TASKMESH_TEST_MANAGEMENT_URL": rabbitmq.management_url,
        "TASKMESH_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/production",
        "TASKMESH_HOUSE": "the caller's own",
    }


@pytest.fixture(scope="module")
def verify(environment: dict[str, str]) -> Callable[..., Verified]:
    """Call it with a service and further arguments."""

    def run(service: str, *arguments: str) -> Verified:
        ended = subprocess.run(
            [taskmesh(), "verify", "--service", service, "--json", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Verified(ended.returncode, json.loads(ended.stdout or "{}"), ended.stderr)

    return run


@pytest.fixture(scope="module")
def ledgers(verify: Callable[..., Verified]) -> Verified:
    """All types of the service, verified once for the whole module."""
    return verify("ledgers")


def taskmesh() -> str:
    return str(Path(sys.executable).with_name("taskmesh"))


def test_exactly_the_tasks_that_do_their_work_twice_are_named(ledgers):
    """A step that is committed anew in each run, a mail that is sent anew, and a hook of Celery's; and nothing else."""
    assert [each["type"] for each in ledgers.report["types"] if each["verdict"] == "differs"] == [
        "ledgers.entry.append",
        "ledgers.notice.mail",
        "ledgers.visit.count",
    ], ledgers.said
    assert ledgers.exit_code == 1


def test_it_says_what_was_done_twice(ledgers):
    assert ledgers.details("ledgers.entry.append", "killed") == ["table entries: 2, not 1"]
    assert ledgers.details("ledgers.notice.mail", "killed") == ["mails: 2, not 1"]


def test_each_way_can_find_a_difference(ledgers):
    """Work in a hook that every delivery runs through is done twice, however the second one comes about."""
    assert ledgers.verdicts("ledgers.visit.count") == {"again": "differs", "killed": "differs", "at_once": "differs"}


@pytest.mark.parametrize("name", ["ledgers.entry.post", "ledgers.entry.claim", "ledgers.entry.posted"])
def test_an_idempotent_task_is_fine_in_every_way(ledgers, name):
    """A whole task, one that claims its work by the task's id, and a listener."""
    assert ledgers.verdicts(name) == {"again": "ok", "killed": "ok", "at_once": "ok"}


def test_what_one_delivery_does_is_told(ledgers):
    assert ledgers["ledgers.entry.post"]["effects"] == [
        "message ledgers.entry.posted: +1",
        "message ledgers.receipt.print: +1",
        "table entries: +1",
    ]


def test_a_type_is_tried_with_a_payload_that_another_type_has_sent(ledgers):
    """A receipt needs an entry that exists: the one that was posted when the receipt was asked for."""
    assert ledgers["ledgers.receipt.print"]["payload"] == "sent by ledgers.entry.post"
    assert ledgers["ledgers.receipt.print"]["verdict"] == "ok"


def test_a_type_whose_payload_only_fails_is_never_called_fine(ledgers):
    assert set(ledgers.verdicts("ledgers.account.close").values()) == {"not_exercised"}
    assert ledgers.details("ledgers.account.close", "killed")[0].startswith("failed with account_unknown")


def test_a_service_with_a_type_that_could_not_be_exercised_does_not_pass(verify):
    assert verify("ledgers", "--only", "ledgers.account.close").exit_code == 2


def test_a_given_payload_exercises_what_a_made_one_cannot(verify, tmp_path):
    payload = tmp_path / "close.json"
    payload.write_text('{"account": "4711"}')

    verified = verify(
        "ledgers",
        "--only",
        "ledgers.account.close",
        "--payload",
        f"ledgers.account.close={payload}",
        "--probe",
        "date +%N",
    )

    assert verified.exit_code == 1
    assert verified["ledgers.account.close"]["payload"] == "given"
    assert verified.details("ledgers.account.close", "at_once") == []
    assert verified.details("ledgers.account.close", "again") == ["probe `date +%N`: other values in output"]


def test_a_type_that_the_service_does_not_have_is_a_mistake(verify):
    verified = verify("ledgers", "--only", "ledgers.account.opne")

    assert verified.exit_code == 2
    assert "ledgers.account.close" in verified.said


def test_a_service_that_does_not_come_up_says_why(verify):
    """Its settings are missing: the caller's own variables are not handed on."""
    verified = verify("ledgers", "--package", "no_such_package")

    assert verified.exit_code == 2
    assert "No module named no_such_package" in verified.said


@pytest.mark.flows
@pytest.mark.parametrize(
    ("service", "types"),
    [
        ("billing", ["billing.document.render", "billing.invoice.issue"]),
        ("email", ["billing.document.ready", "email.message.send"]),
    ],
)
def test_the_services_that_ship_are_idempotent(verify, service, types):
    """Out of the box, with nothing but their names."""
    verified = verify(service)

    assert {each["type"]: each["verdict"] for each in verified.report["types"]} == dict.fromkeys(types, "ok")
    assert verified.exit_code == 0


@pytest.fixture
def interrupted(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in the middle of its work, with its folders below `tmp_path`."""
    # All of its types: one would be done before the signal comes, on a busy machine.
    # Tests that a shell runs in its background ignore Ctrl-C, and so would their children.
    command = ["env", "--default-signal=INT", taskmesh(), "verify", "--service", "ledgers"]
    process = subprocess.Popen(
        command, env=environment | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr
    for line in process.stderr:
        if "alone" in line:
            break
    eventually(lambda: workers(tmp_path))
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


def processes(folder: Path) -> list[tuple[str, dict[str, str]]]:
    """The command line and the environment of each process whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode().replace("\0", " ")
            if str(folder) in command:
                variables = path.with_name("environ").read_bytes().decode().rstrip("\0").split("\0")
                found.append((command, dict(variable.split("=", 1) for variable in variables if variable)))
        except OSError:
            continue
    return found


def workers(folder: Path) -> list[str]:
    """The processes whose command line names the folder."""
    return [command for command, _ in processes(folder)]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_verification_leaves_nothing_behind(
    interrupted, number, exit_code, postgres, rabbitmq, tmp_path
):
    """No process, no database, no virtual host, no user, and no file of its own: other tests have some, too."""
    _, told = processes(tmp_path)[0]
    database = urlsplit(told["TASKMESH_DATABASE_URL"]).path[1:]
    vhost = urlsplit(told["TASKMESH_AMQP_URL"]).path[1:]
    interrupted.send_signal(number)

    assert interrupted.wait(300) == exit_code
    assert workers(tmp_path) == []
    assert not list(tmp_path.glob("taskmesh-verify-*"))
    with psycopg.connect(postgres) as admin:
        left = admin.execute("select datname from pg_database where starts_with(datname, %s)", (database,)).fetchall()
    with Management(rabbitmq.management_url) as management:
        names = [found["name"] for path in ("/users", "/vhosts") for found in management._list(path)]
    assert (left, [name for name in names if name.startswith(vhost)]) == ([], [])


def test_the_worker_ends_with_a_verifier_that_is_killed(interrupted, tmp_path):
    interrupted.kill()

    eventually(lambda: not workers(tmp_path))


def test_the_command_line_loads_no_celery_until_it_verifies():
    code = "import sys, taskmesh.cli; sys.exit('celery' in sys.modules or 'taskmesh.parts' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_rows_are_a_difference_whatever_they_hold():
    assert effects.differences({"table a": [{"x": 1}]}, {"table a": [{"x": 1}, {"x": 1}]}, varying={}) == [
        "table a: 2, not 1"
    ]


def test_a_column_that_varies_by_itself_is_not_compared():
    first, second = {"table a": [{"id": 1, "x": 1}]}, {"table a": [{"id": 2, "x": 1}]}
    found = {"table a": [{"id": 3, "x": 2}]}

    varying = effects.varying_columns(first, second)

    assert varying == {"table a": {"id"}}
    assert effects.differences(first, found, varying=varying) == ["table a: other values in x"]


@pytest.mark.parametrize("ignored", ["table a", "table a.x"])
def test_what_is_to_be_ignored_is_not_compared(ignored):
    found = {"table a": [{"x": 2}]}

    assert effects.differences({"table a": [{"x": 1}]}, found, varying={}, ignore=frozenset({ignored})) == []


def test_an_environment_file_reads_as_a_shell_would(tmp_path):
    path = tmp_path / "environment"
    path.write_text("# a comment\nexport A='one two'\nB=three # and why\n\nC=a=b\n")

    assert plan.read_environment(path) == {"A": "one two", "B": "three", "C": "a=b"}


def test_a_variable_to_be_taken_over_must_be_set():
    with pytest.raises(PlanMistake, match="NO_SUCH_VARIABLE is not set"):
        plan.variables(["NO_SUCH_VARIABLE"])
