"""The commands, with everything they start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from taskmesh.contracts.billing import IssueInvoice
from taskmesh.parts.processes import Process
from taskmesh.parts.rabbitmq.programs import RELEASE_VARIABLE
from taskmesh_local import environment
from taskmesh_local.folders import FOLDER_VARIABLE, Folders

pytestmark = [pytest.mark.flows, pytest.mark.timeout(400)]


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "mesh")


@pytest.fixture
def command(folders):
    """Run `python -m taskmesh_local ...` for a mesh of this test alone, and delete it in the end."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name == RELEASE_VARIABLE or not name.startswith("TASKMESH_")
    }
    variables |= {FOLDER_VARIABLE: str(folders.root), "COLUMNS": "200"}

    def run(*words):
        arguments = [sys.executable, "-m", "taskmesh_local", *words]
        return subprocess.run(arguments, env=variables, capture_output=True, text=True, check=False)

    yield run
    run("down", "--purge")


def _processes(folders):
    """Every process that the mesh has a record of."""
    records = dict(json.loads(folders.state.read_text())["processes"])
    for part in ("postgres", "rabbitmq"):
        record = json.loads((folders.root / part / f"{part}.json").read_text())
        records |= {part: record["process"]} | ({"epmd": record["epmd"]} if part == "rabbitmq" else {})
    return {name: Process.from_json(record) for name, record in records.items()}


def test_a_mesh_comes_up_mends_what_is_killed_and_goes_down_without_a_trace(command, folders, payload_factory):
    """One story, because starting everything is the dear part of it."""
    up = command("up")
    assert up.returncode == 0, up.stderr + up.stdout
    variables = environment.read(folders.env)
    headers = {"Authorization": f"Bearer {variables['TASKMESH_API_KEY']}"}
    with httpx.Client(base_url=variables["TASKMESH_URL"], headers=headers, timeout=60, trust_env=False) as api:
        started = _processes(folders)
        assert all(process.is_running() for process in started.values())
        status = command("status")
        assert (status.returncode, "All 13 are up." in status.stdout) == (0, True)

        killed = ("rabbitmq", "postgres", "billing-worker", "gateway-api", "inbox")
        for name in killed:
            os.kill(started[name].pid, signal.SIGKILL)
            assert started[name].wait(10)
        status = command("status")
        assert status.returncode == 1
        assert re.search(r"[5-9] of 13 are not up: .*billing-worker", status.stdout)

        up = command("up")
        assert up.returncode == 0, up.stderr + up.stdout
        mended = _processes(folders)
        assert {name for name in started if mended[name] != started[name]} == {*killed, "epmd"}
        assert environment.read(folders.env) == variables

        task = {"type": "billing.invoice.issue", "payload": payload_factory(IssueInvoice)}
        answer = api.post("/v1/tasks", json=task, headers={"Prefer": "wait=50"})
        assert answer.json()["state"] == "succeeded", answer.text

    down = command("down")
    assert down.returncode == 0, down.stderr
    assert "had to be killed" not in down.stdout
    assert not any(process.is_running() for process in mended.values())
    assert command("status").returncode == 1


def test_nothing_to_stop_is_no_error(command):
    """`make down` may be typed at any time."""
    down = command("down")

    assert (down.returncode, down.stderr) == (0, "")


def test_an_unknown_process_is_named_with_those_there_are(command):
    answer = command("up", "gateway")
    assert answer.returncode == 2
    assert answer.stderr.startswith("There is no process gateway. There are: postgres, rabbitmq,")


def test_a_reader_that_has_seen_enough_ends_the_logs_quietly(folders):
    log = folders.log("gateway-api")
    log.parent.mkdir(parents=True)
    log.write_text("one line\n" * 100)
    variables = dict(os.environ) | {FOLDER_VARIABLE: str(folders.root)}
    command = [sys.executable, "-m", "taskmesh_local", "logs", "gateway-api"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=variables, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_folder_that_cannot_be_written_is_told_of_in_one_line(command, folders):
    folders.root.parent.mkdir(exist_ok=True)
    folders.root.write_text("a file is in the way")
    answer = command("up")
    folders.root.unlink()
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"✗ {folders.root}: File exists. The mesh keeps what it has in {folders.root};")


def test_a_damaged_record_is_told_of_in_one_line(command, folders):
    folders.root.mkdir()
    folders.state.write_text("{")
    answers = [command(word) for word in ("up", "status", "down")]
    folders.state.unlink()
    assert {answer.returncode for answer in answers} == {1}
    assert all(answer.stderr.startswith(f"✗ {folders.state} cannot be read") for answer in answers)
    assert all(len(answer.stderr.splitlines()) == 1 for answer in answers)
