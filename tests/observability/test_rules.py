"""The rules of Prometheus: they are sound, they fire when they should and not otherwise, and each alert has its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from taskmesh_observability.promql import Unsound, labels_of
from taskmesh_observability.rules import FOLDER, Rule, rules, with_recorded

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((Path(__file__).parent / "rules").glob("*.test.yml"))
CONFIGURATIONS = sorted(FOLDER.parent.glob("prometheus-*.yml"))
ALERTS = [rule for rule in rules() if rule.is_alert]


def by_file(path):
    return path.name


def test_promtool_accepts_the_rules(promtool):
    answer = promtool("check", "rules", "--lint=all", "--lint-fatal", *sorted(FOLDER.glob("*.yml")))

    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=by_file)
def test_promtool_accepts_the_configuration(promtool, path):
    """With the rules that it names."""
    answer = promtool("check", "config", path)

    assert answer.returncode == 0, answer.stdout
    assert f"SUCCESS: {len(list(FOLDER.glob('*.yml')))} rule files found" in answer.stdout


@pytest.mark.parametrize("path", CASES, ids=by_file)
def test_alerts_fire_when_they_should_and_not_otherwise(promtool, path):
    answer = promtool("test", "rules", path)

    assert answer.returncode == 0, answer.stdout


def test_a_rule_that_does_not_do_as_its_case_says_is_found(promtool, tmp_path):
    """The cases can fail: a threshold that is twice as high keeps an alert from firing."""
    folder = tmp_path / "rules"
    folder.mkdir()
    for path in FOLDER.glob("*.yml"):
        text = path.read_text()
        (folder / path.name).write_text(text.replace("outbox_lag_seconds) > 60", "outbox_lag_seconds) > 1200"))
    case = next(path for path in CASES if path.name == "standstill.test.yml").read_text()
    planted = tmp_path / "planted.test.yml"
    planted.write_text(case.replace("../../../deploy/observability/prometheus/rules", str(folder)))

    answer = promtool("test", "rules", planted)

    assert answer.returncode != 0
    assert "alertname: TaskmeshOutboxLags" in answer.stdout


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: f"{rule.name}-{rule.labels['severity']}")
def test_every_alert_has_cases_in_which_it_fires_and_is_silent(alert):
    cases = [
        case
        for path in CASES
        for group in yaml.safe_load(path.read_text())["tests"]
        for case in group["alert_rule_test"]
        if case["alertname"] == alert.name
    ]
    fired = [each["exp_labels"] for case in cases for each in case["exp_alerts"]]

    assert any(dict(alert.labels).items() <= labels.items() for labels in fired)
    assert any(not case["exp_alerts"] for case in cases)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_a_rule_names_only_what_is_exported_or_recorded(known, rule):
    """Metrics, labels, joins, and the labels that an annotation quotes."""
    labels = labels_of(rule.expression, known) or frozenset()

    assert rule.quoted <= labels | set(rule.labels)


@pytest.mark.parametrize(
    "expression",
    [
        "taskmesh_outbox_lag > 60",
        'taskmesh_queue_messages{status="ready"}',
        "sum by (service) (taskmesh_outbox_lag_seconds)",
        "max by (service) (taskmesh_dead_letters_open) / max by (job) (taskmesh_worker_slots)",
        "histogram_quantile(0.9, sum by (type) (rate(taskmesh_task_duration_seconds_bucket[5m])))",
        "max(taskmesh_unaccounted_tasks",
    ],
)
def test_a_rule_that_names_something_else_is_found(known, expression):
    with pytest.raises(Unsound):
        labels_of(expression, known)


def test_a_rule_that_builds_on_one_further_down_is_found(exported):
    """Prometheus would evaluate it with what was recorded a turn before, or with nothing."""
    late = [Rule("a:b", is_alert=False, expression="c:d"), Rule("c:d", is_alert=False, expression="vector(1)")]

    with pytest.raises(Unsound):
        with_recorded(exported, late)


def test_every_target_is_a_bucket_of_the_histogram():
    """A target between two buckets would find none, and the objective would be measured by nobody."""
    text = (FOLDER / "objectives.yml").read_text()
    buckets = set(map(float, re.findall(r"^ +# (0\.005 .*)$", text, re.MULTILINE)[0].split()))
    [targets] = [rule.expression for rule in rules() if rule.name == "taskmesh:objective:target_seconds"]

    assert {
        float(each) for each in re.findall(r"vector\((\d+)\)|(\d+) \* group", targets) for each in each if each
    } <= buckets


def test_every_alert_has_a_page_in_the_runbook_and_every_page_an_alert():
    pages = set(re.findall(r"^### (Taskmesh\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE))

    assert pages == {alert.name for alert in ALERTS}
    assert {alert.annotations["runbook_url"] for alert in ALERTS} == {
        f"docs/runbook.md#{page.lower()}" for page in pages
    }


def test_the_runbook_says_which_alerts_were_tried_in_a_real_mesh():
    """As the trial has them; the others say that they were not."""
    trial = (Path(__file__).parent / "test_provoked_faults.py").read_text()
    pages = re.split(r"^### ", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)
    said = {page.partition("\n")[0]: page for page in pages if page.startswith("Taskmesh")}

    assert {name for name, page in said.items() if "\n**Tried**: " in page} == set(re.findall(r'"(Taskmesh\w+)', trial))
    assert all(("\n**Tried**: " in page) is not ("\n**Not tried**" in page) for page in said.values())


def test_every_alert_says_how_urgent_it_is():
    assert {alert.labels["severity"] for alert in ALERTS} == {"page", "ticket"}
    assert all({"summary", "description", "runbook_url"} == set(alert.annotations) for alert in ALERTS)
