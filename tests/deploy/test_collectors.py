"""The configurations of the two tiers of collectors, as far as that can be told without one."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from manifests import Documents, named, of_kind, pod_of

from .conftest import ROOT

ORIGIN = ROOT / "deploy" / "observability" / "collector" / "collector.yml"
KINDS = ("receivers", "processors", "exporters", "connectors", "extensions")


def configuration(documents: Documents, tier: str) -> dict[str, Any]:
    """What a tier's pods are told, by the ConfigMap that they mount."""
    [workload] = [
        each for each in of_kind(documents, "Deployment", "StatefulSet") if each["metadata"]["name"] == f"otel-{tier}"
    ]
    [volume] = [each for each in pod_of(workload)["spec"]["volumes"] if each["name"] == "config"]
    return yaml.safe_load(named(documents, "ConfigMap", volume["configMap"]["name"])["data"]["config.yaml"])


@pytest.mark.parametrize("tier", ["gateway", "sampler"])
def test_pipelines_use_what_is_configured_and_nothing_is_configured_for_nothing(production, tier):
    told = configuration(production, tier)
    defined = {name for kind in KINDS for name in told.get(kind, {})}
    pipelines = told["service"]["pipelines"].values()
    used = {name for pipeline in pipelines for names in pipeline.values() for name in names}

    assert used | set(told["service"]["extensions"]) == defined
    assert all(pipeline["processors"][0] == "memory_limiter" for pipeline in pipelines)


def test_all_spans_are_counted_before_any_is_sampled_away(production):
    traces = configuration(production, "gateway")["service"]["pipelines"]["traces"]

    assert "spanmetrics" in traces["exporters"]
    assert not [name for name in traces["processors"] if "sampl" in name]
    assert configuration(production, "gateway")["exporters"]["load_balancing"]["routing_key"] == "traceID"


def test_what_prometheus_scrapes_from_the_roles_it_does_not_scrape_from_the_collectors_again(production):
    """Every task would be counted twice."""
    pipelines = configuration(production, "gateway")["service"]["pipelines"].values()
    scraped = {name for each in pipelines if "prometheus" in each["exporters"] for name in each["receivers"]}

    assert scraped == {"spanmetrics"}


def test_the_second_tier_keeps_the_traces_that_the_single_collector_keeps(production):
    wanted = yaml.safe_load(ORIGIN.read_text())["processors"]["tail_sampling"]
    told = configuration(production, "sampler")["processors"]["tail_sampling"]

    assert told["policies"] == wanted["policies"]
    assert told["decision_wait"] == wanted["decision_wait"]
