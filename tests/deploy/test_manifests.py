"""Each overlay that is fit for real work holds to every check, and each check catches a fault that is planted for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from manifests import CHECKS, SCALERS, Documents, Resource, named, of_kind, pod_of


@pytest.mark.parametrize("overlay", ["staging", "production"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_overlay_holds(render, overlay: str, check: str):
    assert CHECKS[check](render(overlay)) == []


def worker(documents: Documents) -> Resource:
    return named(documents, "Deployment", "billing-worker")


def spec(documents: Documents) -> Resource:
    return pod_of(worker(documents))["spec"]


def container(documents: Documents) -> Resource:
    return spec(documents)["containers"][0]


def scaled(documents: Documents) -> Resource:
    return named(documents, "ScaledObject", "email-worker")["spec"]


def second_scaler(documents: Documents) -> None:
    autoscaler = named(documents, "HorizontalPodAutoscaler", "gateway-api")
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "email-worker"}
    documents.append(autoscaler | {"spec": autoscaler["spec"] | {"scaleTargetRef": target}})


def trigger(documents: Documents, **metadata: Any) -> None:
    scaled(documents)["triggers"][0]["metadata"].update(metadata)


def without(documents: Documents, kind: str, name: str) -> None:
    documents.remove(named(documents, kind, name))


FAULTS: list[tuple[str, str, Callable[[Documents], object]]] = [
    ("images_are_pinned", "a tag", lambda it: container(it).update(image="taskmesh/billing-worker:latest")),
    ("images_are_pinned", "a tag of an init container", lambda it: spec(it)["initContainers"][0].update(image="a:1")),
    ("pods_are_restricted", "root", lambda it: spec(it)["securityContext"].update(runAsNonRoot=False)),
    ("pods_are_restricted", "no user number", lambda it: spec(it)["securityContext"].pop("runAsUser")),
    ("pods_are_restricted", "no seccomp", lambda it: spec(it)["securityContext"].pop("seccompProfile")),
    (
        "pods_are_restricted",
        "a writable root",
        lambda it: container(it)["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (
        "pods_are_restricted",
        "a capability of an init container",
        lambda it: spec(it)["initContainers"][0]["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
    ),
    ("resources_are_said", "no memory limit", lambda it: container(it)["resources"].pop("limits")),
    ("resources_are_said", "a cpu limit", lambda it: container(it)["resources"]["limits"].update(cpu="1")),
    ("no_pod_has_a_token", "the default", lambda it: spec(it).pop("automountServiceAccountToken")),
    (
        "no_pod_has_a_token",
        "by hand",
        lambda it: spec(it)["volumes"].append({"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}),
    ),
    ("accounts_are_their_own", "a shared one", lambda it: spec(it).update(serviceAccountName="email-worker")),
    ("accounts_are_their_own", "the default one", lambda it: spec(it).pop("serviceAccountName")),
    ("each_worker_scales_by_its_own_queue", "another's queue", lambda it: trigger(it, queueName="billing")),
    ("each_worker_scales_by_its_own_queue", "none", lambda it: without(it, "ScaledObject", "email-worker")),
    ("each_target_has_one_scaler", "two", second_scaler),
    ("each_target_has_one_scaler", "no target", lambda it: without(it, "Deployment", "billing-worker")),
    ("nobody_else_sets_replicas", "replicas", lambda it: worker(it)["spec"].update(replicas=3)),
    ("nobody_else_sets_replicas", "no scaler", lambda it: [it.remove(each) for each in of_kind(it, *SCALERS)]),
    ("triggers_count_what_is_held", "AMQP", lambda it: trigger(it, protocol="amqp")),
    ("triggers_count_what_is_held", "ready alone", lambda it: trigger(it, excludeUnacknowledged="true")),
    ("triggers_count_what_is_held", "a host in the open", lambda it: trigger(it, host="http://rabbitmq:15672")),
    ("scaling_survives_outages", "static", lambda it: scaled(it)["fallback"].update(behavior="static")),
    (
        "scaling_survives_outages",
        "no window",
        lambda it: scaled(it)["advanced"]["horizontalPodAutoscalerConfig"]["behavior"].pop("scaleDown"),
    ),
    ("scaling_survives_outages", "blind to retries", lambda it: scaled(it)["triggers"].pop()),
    ("each_deployment_has_a_budget", "none", lambda it: without(it, "PodDisruptionBudget", "email-relay")),
    (
        "each_deployment_has_a_budget",
        "one that never lets go",
        lambda it: named(it, "PodDisruptionBudget", "email-relay")["spec"].update(maxUnavailable=0),
    ),
    ("everything_is_denied_first", "no default", lambda it: without(it, "NetworkPolicy", "default-deny")),
    (
        "everything_is_denied_first",
        "egress to anywhere",
        lambda it: named(it, "NetworkPolicy", "email-worker")["spec"]["egress"].append({}),
    ),
    (
        "everything_is_denied_first",
        "a port to anywhere",
        lambda it: named(it, "NetworkPolicy", "email-worker")["spec"]["egress"].append({"ports": [{"port": 443}]}),
    ),
    (
        "no_secret_is_written_down",
        "a Secret",
        lambda it: it.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}),
    ),
    (
        "no_secret_is_written_down",
        "a URL with a password",
        lambda it: container(it).update(env=[{"name": "X", "value": "amqps://billing:secret@rabbitmq/taskmesh"}]),
    ),
    (
        "liveness_asks_nobody",
        "celery's ping",
        lambda it: container(it)["livenessProbe"].update(exec={"command": ["celery", "inspect", "ping"]}),
    ),
    (
        "liveness_asks_nobody",
        "the ledger",
        lambda it: pod_of(named(it, "Deployment", "gateway-api"))["spec"]["containers"][0]["livenessProbe"].update(
            httpGet={"path": "/readyz"}
        ),
    ),
    ("rollouts_lose_nobody", "Recreate", lambda it: worker(it)["spec"].update(strategy={"type": "Recreate"})),
    ("rollouts_lose_nobody", "no readiness", lambda it: container(it).pop("readinessProbe")),
    ("roles_wait_for_setup", "nobody waits", lambda it: spec(it).pop("initContainers")),
    ("roles_wait_for_setup", "another release", lambda it: spec(it)["initContainers"][0].update(image="taskmesh/x:1")),
]


@pytest.mark.parametrize(("check", "fault", "plant"), FAULTS, ids=[f"{check}-{fault}" for check, fault, _ in FAULTS])
def test_a_planted_fault_is_caught(production, check: str, fault: str, plant: Callable[[Documents], object]):
    assert CHECKS[check](production) == []

    plant(production)

    assert CHECKS[check](production) != []


def test_every_check_has_a_planted_fault():
    assert {check for check, _, _ in FAULTS} == set(CHECKS)
