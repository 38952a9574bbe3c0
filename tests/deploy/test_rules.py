"""Alert rules: they parse, they fire when they should, and the copied ones are not old."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from manifests import Documents, named, of_kind

from .conftest import K8S, ROOT, find

CASES = Path(__file__).with_name("rules_test.yml")
OBSERVABILITY = ROOT / "deploy" / "observability"


def promtool(*arguments: object) -> str:
    """What promtool has to say against something."""
    tool = find("promtool", how="apt-get install prometheus")
    answer = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    return answer.stdout + answer.stderr if answer.returncode else ""


def write(folder: Path, documents: Documents) -> Path:
    groups = [group for rule in of_kind(documents, "PrometheusRule") for group in rule["spec"]["groups"]]
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def cases(folder: Path, rules: Path) -> Path:
    path = folder / "cases.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CASES.read_text()) | {"rule_files": [str(rules)]}))
    return path


def copying() -> ModuleType:
    """The program that copies rules and dashboards."""
    loader = importlib.machinery.SourceFileLoader("copy_observability", str(K8S / "copy-observability"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_rules_parse_and_fire_when_they_should(tmp_path, production):
    rules = write(tmp_path, production)

    assert promtool("check", "rules", rules) == ""
    assert promtool("test", "rules", cases(tmp_path, rules)) == ""


def test_a_rule_that_does_not_parse_is_caught(tmp_path, production):
    rule = named(production, "PrometheusRule", "taskmesh-kubernetes")["spec"]["groups"][0]["rules"][0]

    rule["expr"] = "max by (job_name (kube_job_failed)"

    assert promtool("check", "rules", write(tmp_path, production)) != ""


@pytest.mark.parametrize("alert", ["TaskmeshSetupFailed", "TaskmeshScalerBlind", "TaskmeshScaledToTheLimit"])
def test_a_rule_that_never_fires_is_caught(tmp_path, production, alert):
    [group] = named(production, "PrometheusRule", "taskmesh-kubernetes")["spec"]["groups"]
    [rule] = [each for each in group["rules"] if each["alert"] == alert]

    rule["expr"] = f"({rule['expr']}) > 1e9"

    assert alert in promtool("test", "rules", cases(tmp_path, write(tmp_path, production)))


def test_every_alert_of_kubernetes_has_a_page_and_a_case(production):
    readme = (K8S / "README.md").read_text()
    tested = {
        test["alertname"] for case in yaml.safe_load(CASES.read_text())["tests"] for test in case["alert_rule_test"]
    }

    for group in named(production, "PrometheusRule", "taskmesh-kubernetes")["spec"]["groups"]:
        for rule in group["rules"]:
            page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
            assert page == "deploy/k8s/README.md"
            assert re.search(rf"^#+ {rule['alert']}$", readme, re.MULTILINE | re.IGNORECASE), anchor
            assert rule["alert"] in tested


def test_the_copies_of_rules_and_dashboards_are_not_old():
    """`.venv/bin/python deploy/k8s/copy-observability` makes them anew."""
    for path, text in copying().copies(OBSERVABILITY).items():
        assert path.read_text() == text, path.name
