"""`taskmesh plan`: what it prints, what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from taskmesh import cli
from taskmesh.planning.scenarios import Scenario, Trigger
from taskmesh.planning.sizing import Plan

USUAL = ("plan", "--rate", "3", "--peak", "15", "--run", "500ms")


@pytest.fixture
def taskmesh(monkeypatch, capsys):
    """Runs one command line without a mesh; returns its exit code and what it wrote."""
    monkeypatch.delenv("TASKMESH_URL", raising=False)

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        wrote = capsys.readouterr()
        return code, wrote.out, wrote.err

    return run


def test_a_plan_names_pods_and_trigger_values(taskmesh):
    code, out, err = taskmesh(*USUAL)

    assert (code, err) == (0, "")
    assert "load       3 tasks/s, at most 15; 500 ms each, cv 1" in out
    assert "pods       1 to 5" in out
    assert "value 12: messages per pod, ready and unacknowledged" in out
    assert "value 5: seconds per pod" in out
    assert "TASKS/S  WHAT" in out


def test_as_json_it_is_one_document_that_a_program_can_read_back(taskmesh):
    code, out, _ = taskmesh(*USUAL, "--simulate", "steady", "--json")

    answer = json.loads(out)
    assert code == 0
    assert Plan.model_validate(answer["plan"]).triggers.queue_value == 12
    assert answer["simulation"]["scenario"] == "steady"
    assert len(answer["simulation"]["timeline"]) == 120


@pytest.mark.parametrize("scenario", [each for each in Scenario if each not in (Scenario.FLOOD, Scenario.WAVE)])
def test_each_scenario_can_be_simulated_and_drawn(taskmesh, tmp_path, scenario):
    """The picture is XML, has its four panels, and is small enough to be kept with the code."""
    file = tmp_path / "run.svg"

    code, out, _ = taskmesh(*USUAL, "--simulate", scenario, "--plot", file)

    assert code == 0
    assert f"Simulated: {scenario}, both" in out
    words = [text.text for text in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert {"due, tasks/s", "waiting, tasks", "pods", "delay of those that start, s"} <= {*words}
    assert file.stat().st_size < 25_000


@pytest.mark.parametrize("trigger", Trigger)
def test_each_trigger_can_be_simulated(taskmesh, trigger):
    code, out, _ = taskmesh(*USUAL, "--simulate", "slow", "--trigger", trigger)

    assert code == 0
    assert f"Simulated: slow, {trigger}" in out


def test_a_recorded_load_tells_its_own_rates(taskmesh, tmp_path):
    file = tmp_path / "monday.csv"
    file.write_text("at_seconds,tasks\n0,600\n60,1200\n120,300\n")

    code, out, _ = taskmesh("plan", "--run", "200ms", "--simulate", file)

    assert code == 0
    assert "load       11.6667 tasks/s, at most 20" in out
    assert "Simulated: monday" in out


def test_a_recording_simulates_a_given_plan(taskmesh, tmp_path):
    file = tmp_path / "monday.csv"
    file.write_text("at_seconds,tasks\n0,600\n60,1200\n120,300\n")

    code, out, _ = taskmesh("plan", "--run", "200ms", "--rate", "2", "--peak", "4", "--simulate", file)

    assert code == 0
    assert "load       2 tasks/s, at most 4" in out
    assert "still waiting" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--run", "1s"), "say how many tasks become due per second: --rate 20"),
        (("--rate", "0", "--run", "1s"), "--rate: input should be greater than 0"),
        (("--rate", "5", "--peak", "2", "--run", "1s"), "the peak must not be below the usual rate"),
        (("--rate", "5", "--run", "soon"), "'soon' is no length of time; write 90s"),
        (("--rate", "5", "--run", "0s"), "--run: input should be greater than 0"),
        (("--rate", "1e9", "--run", "1s"), "more than 1,000,000 slots busy: plan a part of it"),
        (("--rate", "5", "--run", "1s", "--percentile", "100"), "--percentile: input should be less than 100"),
        (("--rate", "5", "--run", "1s", "--concurrency", "0"), "--concurrency: input should be greater than or equal to 1"),
        (("--rate", "5", "--run", "1s", "--pool", "solo"), "the concurrency must be 1"),
        (("--rate", "5", "--run", "1s", "--plot", "x.svg"), "--plot draws a simulation: add --simulate"),
        (("--rate", "5", "--run", "1s", "--simulate", "storm"), "there is no scenario 'storm'; there are steady, wave, flood"),
        (("--run", "1s", "--simulate", "gone.csv"), "gone.csv cannot be read: No such file"),
        (("--rate", "5", "--run", "1s", "--prefetch", "4", "--simulate", "steady"), "leave --prefetch out"),
        (("--rate", "9000", "--run", "1s", "--simulate", "steady"), "Divide --rate, --peak and --backlog by the same number"),
        (("--rate", "1", "--run", "1s", "--simulate", "steady", "--plot", "/no/such/x.svg"), "/no/such/x.svg cannot be written"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_says_with_what_to_do(taskmesh, arguments, says):
    code, out, err = taskmesh("plan", *arguments)

    assert (code, out) == (2, "")
    assert says in err
