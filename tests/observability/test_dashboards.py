"""The dashboards: Grafana takes them, every query finds something, every panel says what to do, every link leads somewhere."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from taskmesh_observability.__main__ import FOLDER, written
from taskmesh_observability.dashboards import DASHBOARDS
from taskmesh_observability.promql import labels_of

register_default_plugins()

FILES = sorted(FOLDER.glob("*.json"))
BUILT_IN = {"__rate_interval": "5m", "__range": "3h", "__interval": "1m"}
UNITS = {"s", "cps", "percentunit", "short", "bool_on_off"}


def each_file(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)(test)


def read(path):
    return json.loads(path.read_text())


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard, language):
    """Every query in that language, with its panel."""
    return [
        (panel, target)
        for panel in panels(dashboard)
        for target in panel.get("targets", [])
        if (panel["datasource"]["type"] == "tempo") is (language == "traceql")
    ]


def variables(dashboard):
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def filled_in(text, dashboard):
    """The query as Grafana sends it: each variable has some value, and one that there is not stays as it is."""
    values = BUILT_IN | dict.fromkeys(variables(dashboard), "billing")
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), text)


def as_grafana_reads_it(dashboard):
    """What is left of it after Grafana's own model has read it: unknown fields are gone, missing ones are there."""
    return json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))


def test_the_files_are_what_make_dashboards_writes():
    assert {path.name: path.read_text() for path in FILES} == {name: written(each) for name, each in DASHBOARDS.items()}


@each_file
def test_grafanas_model_keeps_every_field(path):
    """A field that Grafana does not know, or a value that its kind of panel does not have, would not survive."""
    assert as_grafana_reads_it(read(path)) == read(path)


@pytest.mark.parametrize("field", ["gridPos", "fieldConfig", "targets"])
def test_a_misspelt_field_is_found(field):
    dashboard = read(FILES[0])
    panel = panels(dashboard)[1]
    panel[f"{field}s"] = panel.pop(field)

    assert as_grafana_reads_it(dashboard) != dashboard


@each_file
def test_every_query_names_only_what_is_exported_or_recorded(path, known):
    """And each line is named by labels that its query's result has."""
    dashboard = read(path)

    for panel, target in queries(dashboard, "promql"):
        labels = labels_of(filled_in(target["expr"], dashboard), known) or frozenset()
        assert set(re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))) <= labels, panel["title"]
        assert "$" not in filled_in(target["expr"], dashboard), panel["title"]


@each_file
def test_promtool_parses_every_query(path, promtool, tmp_path):
    """As a rule, because promtool checks no query by itself."""
    dashboard = read(path)
    expressions = [filled_in(target["expr"], dashboard) for _, target in queries(dashboard, "promql")]
    records = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": records}]}))

    answer = promtool("check", "rules", file)

    assert answer.returncode == 0, answer.stdout
    assert f"{len(expressions)} rules found" in answer.stdout


@each_file
def test_every_choice_offers_the_values_of_a_label(path, known):
    for variable in variables(read(path)).values():
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            assert label in known[metric]


@each_file
def test_every_search_for_traces_names_documented_attributes(path, telemetry_page):
    documented = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", telemetry_page))

    for panel, target in queries(read(path), "traceql"):
        named = set(re.findall(r"(?:span|resource)\.([a-z_.]+)", target["query"]))
        assert named, panel["title"]
        assert named <= documented, panel["title"]


def test_every_metric_of_the_table_is_on_a_dashboard(exported):
    """What nobody looks at need not be exported. One series of a histogram stands for all three."""
    shown = " ".join(path.read_text() for path in FILES)
    shown += " ".join(path.read_text() for path in (FOLDER.parents[1] / "prometheus" / "rules").glob("*.yml"))
    metrics = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}

    assert not {name for name in metrics if not re.search(rf"\b{name}(_bucket|_count)?\b", shown)}


@each_file
def test_every_panel_has_a_unit_and_says_what_it_means(path):
    for panel in panels(read(path)):
        if panel["type"] == "text":
            continue
        assert len(panel["description"]) > 20, panel["title"]
        if panel["type"] in {"timeseries", "stat"}:
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]


@each_file
def test_every_link_leads_to_a_dashboard_and_a_variable_that_there_are(path, known):
    there = {each["uid"]: set(variables(each)) for each in map(read, FILES)}
    dashboard = read(path)
    tags = {tag for link in dashboard["links"] for tag in link["tags"]}

    assert all(tags <= set(each["tags"]) for each in map(read, FILES))
    for panel, target in queries(dashboard, "promql"):
        for link in panel["fieldConfig"]["defaults"].get("links", []):
            uid, variable, label = re.match(r"/d/([\w-]+)\?var-(\w+)=\${__field\.labels\.(\w+)}&", link["url"]).groups()
            assert variable in there[uid]
            assert label in labels_of(filled_in(target["expr"], dashboard), known), panel["title"]


@each_file
def test_histograms_lead_to_traces(path):
    """Wherever a quantile of a task's time is shown, single tasks are shown with it."""
    for panel in panels(read(path)):
        lines = [
            line for line in panel.get("targets", []) if "taskmesh_task_duration_seconds_bucket" in line.get("expr", "")
        ]
        assert not lines or any(line.get("exemplar") for line in lines), panel["title"]


@each_file
def test_no_panel_lies_over_another(path):
    places = [panel["gridPos"] for panel in read(path)["panels"]]
    ids = [panel["id"] for panel in read(path)["panels"]]

    assert len(ids) == len(set(ids))
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
    assert all(place["x"] + place["w"] <= 24 for place in places)
