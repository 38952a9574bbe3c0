"""The sums of scaling, read from the application itself: what a trigger, a grace period and a limit have to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from billing_worker.tasks import app as billing
from email_worker.tasks import app as email
from gateway.routes import services
from manifests import Documents, Resource, named, of_kind, pod_of
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.planning import sizing
from taskmesh.settings import WorkerSettings
from taskmesh.worker import WorkerApp
from taskmesh.worker.app import configuration, kind_of

APPS = {"billing-worker": billing, "email-worker": email}
DELAY = "taskmesh.io/target-delay-seconds"

WAITING_PER_SLOT = 2
"""Messages for each one that a pod can hold: as many again may wait before another pod is asked for."""

GIVE_BACK_SECONDS = 30
"""To stop what has not ended in its time, and to give back what has not begun."""

MAIN_PROCESS_MIB = 200
"""The worker's own process, beside those that run tasks."""

UNITS = {"Mi": 1, "Gi": 1024}


@dataclass
class Worker:
    """A worker as it is deployed."""

    name: str
    app: WorkerApp
    pod: Resource
    scaler: Resource
    settings: WorkerSettings

    @property
    def concurrency(self) -> int:
        return self.settings.worker_concurrency

    @property
    def prefetch(self) -> int:
        """Messages of one queue that a pod holds for each task it runs at a time."""
        listens = any(kind_of(task) is TaskKind.EVENT for task in tasks(self.app))
        return int(configuration(self.app.service, self.settings, listens=listens)["worker_prefetch_multiplier"])

    @property
    def longest_seconds(self) -> float:
        return max(task.time_limit for task in tasks(self.app))

    def triggers(self, kind: str) -> list[Resource]:
        return [each for each in self.scaler["spec"]["triggers"] if each["type"] == kind]


def tasks(app: WorkerApp) -> Iterator:
    return (task for name, task in app.tasks.items() if not name.startswith("celery."))


def configuration_of(documents: Documents, spec: Resource) -> dict[str, str]:
    """What a pod's container is told by its ConfigMaps."""
    [container] = spec["containers"]
    told: dict[str, str] = {}
    for source in container["envFrom"]:
        told |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    return told


def deployed(documents: Documents, name: str, monkeypatch: pytest.MonkeyPatch) -> Worker:
    pod = pod_of(named(documents, "Deployment", name))["spec"]
    for variable, value in configuration_of(documents, pod).items():
        monkeypatch.setenv(variable, value)
    settings = WorkerSettings(database_url="postgresql://x", amqp_url="amqp://x")
    return Worker(name, APPS[name], pod, named(documents, "ScaledObject", name), settings)


@pytest.fixture(params=["staging", "production"])
def overlay(request, render) -> Documents:
    return render(request.param)


@pytest.fixture(params=list(APPS))
def worker(request, overlay, monkeypatch) -> Worker:
    return deployed(overlay, request.param, monkeypatch)


def wrong_sums(worker: Worker) -> list[str]:
    """What does not agree with the application."""
    held = worker.concurrency * worker.prefetch
    faults = [
        f"{trigger['name']}: {trigger['metadata']['value']} is not {WAITING_PER_SLOT} x {held}"
        for trigger in worker.triggers("rabbitmq")
        if int(trigger["metadata"]["value"]) != WAITING_PER_SLOT * held
    ]
    seconds = worker.concurrency * int(worker.scaler["metadata"]["annotations"][DELAY])
    faults += [
        f"{trigger['name']}: {trigger['metadata']['targetValue']} is not {seconds} s"
        for trigger in worker.triggers("metrics-api")
        if int(trigger["metadata"]["targetValue"]) != seconds
    ]
    stop_seconds = worker.settings.soft_shutdown_seconds
    if stop_seconds < worker.longest_seconds:
        faults.append(f"tasks may run for {worker.longest_seconds} s, and are stopped after {stop_seconds} s")
    if worker.pod["terminationGracePeriodSeconds"] < stop_seconds + GIVE_BACK_SECONDS:
        faults.append("the grace period ends before the worker does")
    [container] = worker.pod["containers"]
    needed = worker.concurrency * (worker.settings.worker_process_mib or 10_000) + MAIN_PROCESS_MIB
    if needed > mebibytes(container["resources"]["limits"]["memory"]):
        faults.append(f"the processes may need {needed} MiB")
    return faults


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_value_matches_concurrency(worker):
    """Triggers follow from concurrency and prefetch, the grace period from time limits, the limit from the processes."""
    assert wrong_sums(worker) == []


def test_value_matches_concurrency_of_every_queue_that_the_worker_consumes(worker):
    listens = any(kind_of(task) is TaskKind.EVENT for task in tasks(worker.app))
    queues = [each.name for each in configuration(worker.app.service, worker.settings, listens=listens)["task_queues"]]

    assert [trigger["metadata"]["queueName"] for trigger in worker.triggers("rabbitmq")] == queues


@pytest.mark.parametrize(
    "plant",
    [
        lambda it: it.triggers("rabbitmq")[0]["metadata"].update(value="3"),
        lambda it: it.triggers("metrics-api")[0]["metadata"].update(targetValue="60"),
        lambda it: it.pod.update(terminationGracePeriodSeconds=300),
        lambda it: it.pod["containers"][0]["resources"]["limits"].update(memory="1Gi"),
    ],
    ids=["fewer-than-a-pod-holds", "another-delay", "too-little-grace", "too-little-memory"],
)
def test_value_matches_concurrency_or_is_caught(production, monkeypatch, plant):
    worker = deployed(production, "billing-worker", monkeypatch)
    assert wrong_sums(worker) == []

    plant(worker)

    assert len(wrong_sums(worker)) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TASKMESH_WORKER_CONCURRENCY", "8"), ("TASKMESH_SOFT_SHUTDOWN_SECONDS", "20")],
)
def test_value_matches_concurrency_when_only_the_setting_is_changed_or_is_caught(
    production, monkeypatch, variable, value
):
    for each in of_kind(production, "ConfigMap"):
        each.get("data", {}).update({variable: value})

    assert wrong_sums(deployed(production, "billing-worker", monkeypatch)) != []


def test_pods_come_and_go_as_the_plan_simulates_it(overlay):
    """Else what docs/scaling.md shows is another autoscaler's doing."""
    for each in of_kind(overlay, "ScaledObject"):
        behavior = each["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        for direction, rules in (("scaleUp", sizing.SCALE_UP), ("scaleDown", sizing.SCALE_DOWN)):
            said = behavior[direction]
            policies = {(it["type"], it["value"], it["periodSeconds"]) for it in said["policies"]}
            assert said["stabilizationWindowSeconds"] == rules.stabilization_seconds
            assert policies == {
                ("Percent" if it.pods is None else "Pods", it.pods or it.percent, it.period_seconds)
                for it in rules.policies
            }


def test_a_fallback_is_no_smaller_than_the_minimum(overlay):
    for each in of_kind(overlay, "ScaledObject"):
        assert each["spec"]["fallback"]["replicas"] >= each["spec"]["minReplicaCount"]


def test_mail_sleeps_in_staging_and_nobody_sleeps_in_production(render):
    def minima(overlay: str) -> dict[str, int]:
        found = of_kind(render(overlay), "ScaledObject")
        return {each["metadata"]["name"]: each["spec"]["minReplicaCount"] for each in found}

    assert minima("staging")["email-worker"] == 0
    assert min(minima("production").values()) >= 2


def test_the_trigger_asks_a_page_that_the_gateway_has(overlay):
    """In the namespace and on the port of its service, and a field of its answer."""
    [page] = [route for route in services.router.routes if route.path == "/v1/services/{service}/outstanding"]
    service = named(overlay, "Service", "gateway")
    for each in of_kind(overlay, "ScaledObject"):
        [trigger] = [it for it in each["spec"]["triggers"] if it["type"] == "metrics-api"]
        url = urlsplit(trigger["metadata"]["url"])
        assert url.hostname == f"gateway.{service['metadata']['namespace']}.svc"
        assert (url.port or 80) in {port["port"] for port in service["spec"]["ports"]}
        name = APPS[each["spec"]["scaleTargetRef"]["name"]].service
        assert url.path == page.path.format(service=name)
        assert trigger["metadata"]["valueLocation"] in page.response_model.model_fields


def test_the_readme_shows_the_sums_as_they_are(render, monkeypatch):
    """Concurrency, prefetch, trigger and grace period of each worker are in the README's table."""
    readme = (Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "README.md").read_text()
    for name in APPS:
        worker = deployed(render("production"), name, monkeypatch)
        [queue, *_], [work] = worker.triggers("rabbitmq"), worker.triggers("metrics-api")
        cells = [
            f"`{name}`",
            worker.concurrency,
            worker.prefetch,
            queue["metadata"]["value"],
            work["metadata"]["targetValue"],
            f"{worker.longest_seconds:.0f}",
            worker.pod["terminationGracePeriodSeconds"],
        ]
        assert re.search(r"\| " + r" \| ".join(re.escape(str(cell)) for cell in cells) + r" \|", readme), cells
