"""The network policies open exactly the flows of the architecture, and nothing else between any two places."""

from __future__ import annotations

import pytest

from flows import Network, Place, pods_of
from manifests import Documents, named

BROKER, BROKER_CLEAR, MANAGEMENT, POSTGRES, OTLP_GRPC, OTLP_HTTP, METRICS, HTTP = (
    5671, 5672, 15671, 5432, 4317, 4318, 9464, 8080,
)  # fmt: skip
ROLES = ("gateway-api", "gateway-projector", "gateway-scheduler", "gateway-relay", "gateway-reconciler")
WORKERS = ("billing-worker", "billing-relay", "email-worker", "email-relay")
SETUPS = ("gateway-setup", "billing-setup", "email-setup")
MESH = (*ROLES, *WORKERS, *SETUPS)

NEEDED: set[tuple[str, str, int]] = {
    # Each role of a service reaches its own database, and no other.
    *((name, f"{name.partition('-')[0]}-db", POSTGRES) for name in MESH),
    # Those that publish or consume reach the broker; the api, the scheduler and the reconciler do not.
    *(
        (name, "rabbitmq", port)
        for name in ("gateway-projector", "gateway-relay", *WORKERS, *SETUPS)
        for port in (BROKER, BROKER_CLEAR)
    ),
    # Its management API: who sets policies, and who only looks.
    *((name, "rabbitmq", port) for name in (*SETUPS, "gateway-reconciler", "keda") for port in (MANAGEMENT, 15672)),
    # The object store and the mail relay.
    ("billing-worker", "internet", 443),
    ("email-worker", "internet", 443),
    ("email-worker", "internet", 465),
    ("email-worker", "internet", 587),
    # Who calls the gateway.
    ("ingress", "gateway-api", HTTP),
    ("caller", "gateway-api", HTTP),
    ("keda", "gateway-api", HTTP),
    # Telemetry.
    *((name, "otel-gateway", port) for name in MESH for port in (OTLP_GRPC, OTLP_HTTP)),
    ("otel-gateway", "otel-sampler", OTLP_GRPC),
    ("otel-sampler", "traces", OTLP_GRPC),
    *(("prometheus", name, METRICS) for name in MESH),
    *(("prometheus", "otel-gateway", port) for port in (8888, 8889)),
    ("prometheus", "otel-sampler", 8888),
    *(("prometheus", "rabbitmq", port) for port in (15691, 15692)),
    *(("prometheus", f"{name}-db", port) for name in ("gateway", "billing", "email") for port in (9127, 9187)),
    # Names, for everybody.
    *((name, "dns", 53) for name in (*MESH, "otel-gateway", "otel-sampler", "rabbitmq")),
    *((f"{name}-db", "dns", 53) for name in ("gateway", "billing", "email")),
    # What the operators' parts need among themselves, with their operators, and from the Kubernetes API.
    *(("rabbitmq", "rabbitmq", port) for port in (4369, 25672)),
    *(("rabbitmq-operators", "rabbitmq", port) for port in (MANAGEMENT, 15672)),
    *((f"{name}-db", f"{name}-db", port) for name in ("gateway", "billing", "email") for port in (POSTGRES, 8000)),
    *(("cnpg-operator", f"{name}-db", port) for name in ("gateway", "billing", "email") for port in (POSTGRES, 8000)),
    *(
        (name, address, port)
        for name in ("rabbitmq", "gateway-db", "billing-db", "email-db", "otel-gateway")
        for address in ("internet", "private")
        for port in (443, 6443)
    ),
}
PORTS = sorted({port for _, _, port in NEEDED} | {22, 25, 80, 3306, 6379})


def outside(name: str, namespace: str, *, labels: dict[str, str] | None = None, **more: str) -> Place:
    return Place(name, namespace, labels or {}, {"kubernetes.io/metadata.name": namespace, **more})


def places(documents: Documents) -> dict[str, Place]:
    """Every pod of the mesh and of its operators, its neighbours, and the world."""
    here = {"kubernetes.io/metadata.name": "taskmesh"}
    found = [
        *pods_of(documents, "Deployment", "StatefulSet", "Job"),
        Place("rabbitmq", "taskmesh", {"app.kubernetes.io/name": "rabbitmq"}, here),
        *(
            Place(f"{service}-db", "taskmesh", {"cnpg.io/cluster": f"{service}-db"}, here)
            for service in ("gateway", "billing", "email")
        ),
        # What somebody else has put into the namespace.
        Place("squatter", "taskmesh", {"app": "squatter"}, here),
        outside("ingress", "gateways"),
        outside("caller", "shop", **{"taskmesh.io/caller": "true"}),
        outside("stranger", "default"),
        outside("keda", "keda"),
        outside("prometheus", "monitoring"),
        outside("traces", "observability"),
        outside("rabbitmq-operators", "rabbitmq-system"),
        outside("cnpg-operator", "cnpg-system"),
        outside("dns", "kube-system", labels={"k8s-app": "kube-dns"}),
        Place("internet", address="203.0.113.7"),
        Place("private", address="10.1.2.3"),
        Place("instance-metadata", address="169.254.169.254"),
    ]
    return {place.name: place for place in found}


def open_flows(documents: Documents) -> set[tuple[str, str, int]]:
    """Every flow with one end in the mesh's namespace that the policies let pass."""
    every, network = places(documents), Network(documents)
    return {
        (source.name, target.name, port)
        for source in every.values()
        for target in every.values()
        if "taskmesh" in {source.namespace, target.namespace} and not source.address
        for port in PORTS
        if network.lets(source, target, port)
    }


def test_network_flows_are_exactly_those_of_the_architecture(production):
    found = open_flows(production)

    assert NEEDED - found == set()
    assert found - NEEDED == set()


def test_network_flows_of_names_go_by_udp_too(production):
    every, network = places(production), Network(production)

    assert all(network.lets(every[name], every["dns"], 53, "UDP") for name in MESH)
    assert not network.lets(every["squatter"], every["dns"], 53, "UDP")


@pytest.mark.parametrize("port", [POSTGRES, BROKER, MANAGEMENT])
def test_network_flows_to_a_managed_data_plane_are_open_in_staging(staging, port):
    every, network = places(staging), Network(staging)
    managed = Place("managed", address="10.20.3.4")

    assert network.lets(every["gateway-relay"], managed, port)
    assert not network.lets(every["gateway-relay"], every["private"], port)
    assert not network.lets(every["otel-gateway"], managed, port)


@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        ("billing-worker", ("billing-worker", "rabbitmq", BROKER)),
        ("rabbitmq", ("keda", "rabbitmq", MANAGEMENT)),
        ("gateway-api", ("keda", "gateway-api", HTTP)),
        ("dns", ("email-worker", "dns", 53)),
    ],
)
def test_network_flows_that_are_missing_are_caught(production, policy, lost):
    production.remove(named(production, "NetworkPolicy", policy))

    assert lost in NEEDED - open_flows(production)


@pytest.mark.parametrize(
    ("policy", "rule", "gained"),
    [
        ("email-worker", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, ("email-worker", "instance-metadata", 80)),
        ("gateway-scheduler", {"to": [{"namespaceSelector": {}}]}, ("gateway-scheduler", "traces", OTLP_GRPC)),
    ],
    ids=["everywhere", "namespaces"],
)
def test_network_flows_too_many_are_caught(production, policy, rule, gained):
    named(production, "NetworkPolicy", policy)["spec"]["egress"].append(rule)

    assert gained in open_flows(production) - NEEDED
