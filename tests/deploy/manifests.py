"""Rendered manifests as data, and what is wanted of them: each check returns what it found wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Resource = dict[str, Any]
Documents = list[Resource]
Check = Callable[[Documents], list[str]]

WORKLOADS = ("Deployment", "StatefulSet", "Job", "CronJob")
SCALERS = ("ScaledObject", "HorizontalPodAutoscaler")
WORKERS = {"billing-worker": "billing", "email-worker": "email"}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def of_kind(documents: Documents, *kinds: str) -> list[Resource]:
    return [each for each in documents if each["kind"] in kinds]


def named(documents: Documents, kind: str, name: str) -> Resource:
    [found] = [each for each in of_kind(documents, kind) if each["metadata"]["name"] == name]
    return found


def name_of(resource: Resource) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


def pod_of(workload: Resource) -> Resource:
    """A workload's pod."""
    spec = workload["spec"]
    template: Resource = spec["jobTemplate"]["spec"]["template"] if "jobTemplate" in spec else spec["template"]
    return template


def pods(documents: Documents) -> Iterator[tuple[str, Resource]]:
    """Name and pod spec of each workload."""
    for workload in of_kind(documents, *WORKLOADS):
        yield name_of(workload), pod_of(workload)["spec"]


def containers(spec: Resource) -> list[Resource]:
    return [*spec["containers"], *spec.get("initContainers", [])]


def images_are_pinned(documents: Documents) -> list[str]:
    return [
        f"{name}: {container['image']}"
        for name, spec in pods(documents)
        for container in containers(spec)
        if not DIGEST.search(container["image"])
    ]


def pods_are_restricted(documents: Documents) -> list[str]:
    return [*_unrestricted_pods(documents), *_unrestricted_containers(documents)]


def _unrestricted_pods(documents: Documents) -> Iterator[str]:
    for name, spec in pods(documents):
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccomp profile"


def _unrestricted_containers(documents: Documents) -> Iterator[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name, spec in pods(documents):
        for container in containers(spec):
            context = container.get("securityContext", {})
            for key, value in wanted.items():
                if context.get(key) != value:
                    yield f"{name}: {container['name']}: {key} is {context.get(key)}"


def resources_are_said(documents: Documents) -> list[str]:
    """Requests for both, a limit for memory, and on purpose none for the processor, which would only slow work down."""
    faults = []
    for name, spec in pods(documents):
        for container in containers(spec):
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if not (requests.get("cpu") and requests.get("memory") and limits.get("memory")) or "cpu" in limits:
                faults.append(f"{name}: {container['name']}")
    return faults


def no_pod_has_a_token(documents: Documents) -> list[str]:
    """None is mounted by itself, and one by hand only in the collector that has to ask which pod has an address."""
    return [
        name
        for name, spec in pods(documents)
        if spec.get("automountServiceAccountToken") is not False
        or ("serviceAccountToken" in str(spec.get("volumes")) and name != "Deployment/otel-gateway")
    ]


def accounts_are_their_own(documents: Documents) -> list[str]:
    """Each workload has a service account that no other has."""
    accounts = [spec.get("serviceAccountName") for _, spec in pods(documents)]
    known = {each["metadata"]["name"] for each in of_kind(documents, "ServiceAccount")}
    return [str(account) for account in accounts if account not in known or accounts.count(account) > 1]


def each_worker_scales_by_its_own_queue(documents: Documents) -> list[str]:
    found = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"]["triggers"][0]["metadata"].get("queueName")
        for each in of_kind(documents, "ScaledObject")
    }
    return [] if found == WORKERS else [f"{found} is not {WORKERS}"]


def each_target_has_one_scaler(documents: Documents) -> list[str]:
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in of_kind(documents, *SCALERS)]
    there = {each["metadata"]["name"] for each in of_kind(documents, "Deployment")}
    twice = [f"{target} has two" for target in set(targets) if targets.count(target) > 1]
    return twice + [f"{target} is not there" for target in set(targets) - there]


def nobody_else_sets_replicas(documents: Documents) -> list[str]:
    targets = {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(documents, *SCALERS)}
    scaled = [each for each in of_kind(documents, "Deployment") if each["metadata"]["name"] in targets]
    return ["nothing is scaled"] * (not scaled) + [name_of(each) for each in scaled if "replicas" in each["spec"]]


def triggers_count_what_is_held(documents: Documents) -> list[str]:
    """Ready and unacknowledged messages, with no secret in the trigger."""
    wanted = {"protocol": "http", "mode": "QueueLength", "excludeUnacknowledged": "false"}
    triggers = [
        (name_of(each), trigger)
        for each in of_kind(documents, "ScaledObject")
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "rabbitmq"
    ]
    faults = ["no trigger looks at a queue"] * (not triggers)
    for name, trigger in triggers:
        metadata = trigger["metadata"]
        faults += [f"{name}: {key}" for key, value in wanted.items() if metadata.get(key) != value]
        if "host" in metadata or not trigger.get("authenticationRef", {}).get("name"):
            faults.append(f"{name}: its address is not in a secret")
    return faults


def scaling_survives_outages(documents: Documents) -> list[str]:
    """Blind scalers keep what runs, and figures that are low for a moment take nobody away."""
    faults = []
    for each in of_kind(documents, "ScaledObject"):
        spec = each["spec"]
        down = (
            spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {}).get("scaleDown", {})
        )
        if spec.get("fallback", {}).get("behavior") != "currentReplicasIfHigher":
            faults.append(f"{name_of(each)}: scales down when blind")
        if down.get("stabilizationWindowSeconds", 0) < 60:
            faults.append(f"{name_of(each)}: scales down at once")
        if not any(trigger["type"] == "metrics-api" for trigger in spec["triggers"]):
            faults.append(f"{name_of(each)}: does not see what is due soon")
    return faults or ["nothing is scaled"] * (not of_kind(documents, "ScaledObject"))


def each_deployment_has_a_budget(documents: Documents) -> list[str]:
    budgets = {
        tuple(sorted(each["spec"]["selector"]["matchLabels"].items())): each["spec"]
        for each in of_kind(documents, "PodDisruptionBudget")
    }
    faults = []
    for each in of_kind(documents, "Deployment"):
        budget = budgets.get(tuple(sorted(each["spec"]["selector"]["matchLabels"].items())))
        if budget is None or budget.get("maxUnavailable") != 1:
            faults.append(name_of(each))
        elif budget.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            faults.append(f"{name_of(each)}: a pod that does not work would hold up a drain")
    return faults


def everything_is_denied_first(documents: Documents) -> list[str]:
    policies = of_kind(documents, "NetworkPolicy")
    denying = [
        each
        for each in policies
        if each["spec"].get("podSelector") == {}
        and sorted(each["spec"].get("policyTypes", [])) == ["Egress", "Ingress"]
        and not {"ingress", "egress"} & set(each["spec"])
    ]
    open_rules = [
        name_of(each)
        for each in policies
        for direction in ("ingress", "egress")
        for rule in each["spec"].get(direction) or []
        if not rule.get("from") and not rule.get("to")
    ]
    return ["there is not exactly one policy that denies everything"] * (len(denying) != 1) + open_rules


def no_secret_is_written_down(documents: Documents) -> list[str]:
    urls = re.compile(r"(amqps?|postgres(ql)?|https?|smtps?)://[^$\s\"']*:[^$\s\"']*@")
    return [name_of(each) for each in of_kind(documents, "Secret")] + [
        name_of(each) for each in documents if urls.search(str(each))
    ]


def liveness_asks_nobody(documents: Documents) -> list[str]:
    """A broker or a database that is away restarts nobody: liveness is a file, or a page that looks at nothing else."""
    faults = []
    for name, spec in pods(documents):
        for container in spec["containers"]:
            probe = container.get("livenessProbe", {})
            command = probe.get("exec", {}).get("command", [])
            path = probe.get("httpGet", {}).get("path")
            if name.startswith("Job/"):
                continue
            if command[:4] != ["python", "-m", "taskmesh.health", "alive"] and path not in {"/livez", "/"}:
                faults.append(f"{name}: {command or path}")
    return faults


def rollouts_lose_nobody(documents: Documents) -> list[str]:
    """New pods come before old ones go, and whoever does not become ready is given up on."""
    faults = []
    for each in of_kind(documents, "Deployment"):
        strategy = each["spec"].get("strategy", {})
        if strategy.get("type") != "RollingUpdate" or strategy["rollingUpdate"].get("maxUnavailable") != 0:
            faults.append(f"{name_of(each)}: {strategy}")
        if any("readinessProbe" not in container for container in pod_of(each)["spec"]["containers"]):
            faults.append(f"{name_of(each)}: nobody asks whether it is ready")
    return faults


def roles_wait_for_setup(documents: Documents) -> list[str]:
    """Each role of a service has an init container of its own image that only looks."""
    faults = []
    for each in of_kind(documents, "Deployment"):
        spec = pod_of(each)["spec"]
        [first, *_] = spec["containers"]
        if "taskmesh/" in first["image"]:
            checks = [it for it in spec.get("initContainers", []) if it["args"] == ["check"]]
            if [it["image"] for it in checks] != [first["image"]]:
                faults.append(name_of(each))
    return faults


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        images_are_pinned,
        pods_are_restricted,
        resources_are_said,
        no_pod_has_a_token,
        accounts_are_their_own,
        each_worker_scales_by_its_own_queue,
        each_target_has_one_scaler,
        nobody_else_sets_replicas,
        triggers_count_what_is_held,
        scaling_survives_outages,
        each_deployment_has_a_budget,
        everything_is_denied_first,
        no_secret_is_written_down,
        liveness_asks_nobody,
        rollouts_lose_nobody,
        roles_wait_for_setup,
    )
}
