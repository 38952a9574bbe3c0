"""The Collector's configuration, as far as it can be held against anything without a Collector."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from taskmesh_observability.rules import FOLDER

CONFIGURATION = FOLDER.parents[1] / "collector" / "collector.yml"
SCHEMA = Draft202012Validator(yaml.safe_load(Path(__file__).with_name("collector.schema.yml").read_text()))
KINDS = ("receivers", "processors", "exporters")


@pytest.fixture
def configuration():
    return yaml.safe_load(CONFIGURATION.read_text())


def faults(configuration):
    """What is wrong with a configuration: what the schema refuses, and what a schema cannot say."""
    found = [error.message for error in SCHEMA.iter_errors(configuration)]
    return found or [*unconnected(configuration), *disordered(configuration), *doubled(configuration)]


def unconnected(configuration):
    """Pipelines take only what is configured, and what is configured is taken."""
    pipelines = configuration["service"]["pipelines"].values()
    for kind in KINDS:
        used = {name for pipeline in pipelines for name in pipeline.get(kind, [])}
        if used != set(configuration[kind]):
            yield f"{kind}: {used ^ set(configuration[kind])}"
    if set(configuration["service"].get("extensions", [])) != set(configuration.get("extensions", {})):
        yield "extensions"


def disordered(configuration):
    """The limiter refuses before anything is kept; batches are made of what is left in the end."""
    for name, pipeline in configuration["service"]["pipelines"].items():
        processors = pipeline.get("processors", [])
        if processors[:1] != ["memory_limiter"] or processors[-1:] != ["batch"]:
            yield f"{name}: {processors}"


def doubled(configuration):
    """Policies are told apart by name, in the Collector's own metrics too."""
    names = [policy["name"] for policy in policies(configuration)]
    if len(names) != len(set(names)):
        yield f"policies: {names}"


def policies(configuration):
    """Every policy, and every part of a policy."""
    for policy in configuration["processors"]["tail_sampling"]["policies"]:
        yield policy
        yield from policy.get("and", {}).get("and_sub_policy", [])


def test_the_configuration_is_sound(configuration):
    assert faults(configuration) == []


def put(path, value):
    """A change: the value at a path, where a list is entered by number or by a policy's name."""

    def change(configuration):
        *way, last = path.split(" ")
        place = configuration
        for step in way:
            place = next(each for each in place if each["name"] == step) if isinstance(place, list) else place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("processors tail_sampling decison_wait", "30s"),
        put("processors tail_sampling decision_wait", "30"),
        put("processors tail_sampling policies errors status_code", {"status_codes": ["FAILED"]}),
        put("processors tail_sampling policies errors type", "latency"),
        put("processors tail_sampling policies errors latency", {"threshold_ms": 1}),
        put("processors tail_sampling policies slow latency", {"treshold_ms": 1}),
        put("processors tail_sampling policies share-of-the-rest probabilistic", {"sampling_percentage": 1000}),
        put("processors tail_sampling policies slow name", "errors"),
        put("processors tail_sampling policies linked ottl_condition", {"spans": ["true"]}),
        put("processors tail_sampling policies unfinished and", {"and_sub_policy": []}),
        put("processors memory_limiter", {"check_interval": "1s"}),
        put("processors memory_limiter limit_percent", 80),
        put("processors batch timeout", 2),
        put("processors filter", {}),
        put("exporters prometheus endpoint", None),
        put("exporters prometheus endpont", "0.0.0.0:1"),
        put("exporters otlp_http/traces endpoint", "tempo:4318"),
        put("exporters debug", {}),
        put("receivers otlp protocols", {"https": {}}),
        put("receivers jaeger", {}),
        put("extensions health_check", None),
        put("service pipelines traces exporters", ["otlp"]),
        put("service pipelines traces processors", ["tail_sampling", "memory_limiter", "batch"]),
        put("service pipelines traces processors", ["memory_limiter", "batch", "tail_sampling"]),
        put("service pipelines metrics processors", ["memory_limiter", "batch"]),
        put("service pipelines spans", {"receivers": ["otlp"], "exporters": ["prometheus"]}),
        put("service telemetry metrics address", "0.0.0.0:8888"),
    ],
)
def test_a_planted_error_is_found(configuration, change):
    wrong = copy.deepcopy(configuration)
    change(wrong)

    assert wrong != configuration
    assert faults(wrong)


def test_policies_ask_for_attributes_that_are_documented(configuration, telemetry_page):
    """With values that there are: a policy that never matches keeps nothing, and nobody notices."""
    documented = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", telemetry_page))
    words = set(re.findall(r"`([\w-]+)`", telemetry_page))

    for policy in policies(configuration):
        settings = policy[policy["type"]]
        conditions = " ".join(settings.get("span", []))
        keys = [settings["key"]] if "key" in settings else re.findall(r'attributes\["([^"]+)"\]', conditions)
        assert set(keys) <= documented, policy["name"]
        assert set(settings.get("values", [])) <= words, policy["name"]


def test_policies_ask_for_spans_that_are_documented(configuration, telemetry_page):
    for policy in policies(configuration):
        for name in re.findall(r'name == "([^"]+)"', str(policy.get("ottl_condition", ""))):
            span, _, exchange = name.partition(" ")
            assert f"`{span} <exchange>`" in telemetry_page
            assert exchange.startswith("taskmesh.")


def test_what_must_be_kept_has_a_policy(configuration):
    """Errors, retries, slow traces, what was sampled late, both ends of links, and a share of the rest."""
    names = [policy["name"] for policy in configuration["processors"]["tail_sampling"]["policies"]]

    assert {"errors", "outcomes", "retries", "slow", "sampled-late", "linked", "unfinished"} <= set(names)
    assert names[-1] == "share-of-the-rest"


def test_conditions_and_statements_are_balanced(configuration):
    """Brackets and quotes of OTTL are closed; more cannot be said without its parser."""
    statements = [
        text for policy in policies(configuration) for text in policy.get("ottl_condition", {}).get("span", [])
    ] + [
        text
        for group in configuration["processors"]["transform/metrics"]["metric_statements"]
        for text in group["statements"]
    ]

    for text in statements:
        assert text.count('"') % 2 == 0, text
        assert text.count("(") == text.count(")"), text
        assert text.count("[") == text.count("]"), text


def test_prometheus_scrapes_where_the_collector_listens(configuration):
    scraped = yaml.safe_load((FOLDER.parent / "prometheus-collector.yml").read_text())["scrape_configs"]
    ports = {job["job_name"]: job["static_configs"][0]["targets"][0].rpartition(":")[2] for job in scraped}
    [reader] = configuration["service"]["telemetry"]["metrics"]["readers"]

    assert configuration["exporters"]["prometheus"]["endpoint"].endswith(f":{ports['taskmesh']}")
    assert str(reader["pull"]["exporter"]["prometheus"]["port"]) == ports["otel-collector"]
