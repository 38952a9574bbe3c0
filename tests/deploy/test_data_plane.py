"""Broker and databases as the manifests declare them, held against what the application declares and expects."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from billing_worker.tasks import app as billing
from email_worker.tasks import app as email
from manifests import Documents, Resource, named, of_kind
from taskmesh.parts.postgres import DATABASE_GRANTS, SCHEMA_GRANTS
from taskmesh.topology import (
    EXCHANGES,
    Permissions,
    Topology,
    gateway_topology,
    permissions,
    setup_permissions,
    worker_topology,
)

from .conftest import K8S

SERVICES = ("gateway", "billing", "email")
TOPOLOGIES: dict[str, Topology] = {
    "gateway": gateway_topology(),
    "billing": worker_topology("billing", billing.listens_to()),
    "email": worker_topology("email", email.listens_to()),
}
NOTHING = Permissions(configure="^$", write="^$", read="^$")
USERS: dict[str, tuple[Permissions, list[str]]] = {
    **{name: (permissions(name), []) for name in SERVICES},
    **{f"{name}-setup": (setup_permissions(name), ["policymaker"]) for name in SERVICES},
    "gateway-observer": (NOTHING, ["monitoring"]),
    "keda": (NOTHING, ["monitoring"]),
}
LOCAL = K8S / "overlays" / "local"


def specs(documents: Documents, kind: str) -> list[Resource]:
    found = [each for each in of_kind(documents, kind) if each["apiVersion"].startswith("rabbitmq.com/")]
    assert all(each["spec"].pop("rabbitmqClusterReference") == {"name": "rabbitmq"} for each in found)
    return [each["spec"] for each in found]


def rights(given: Permissions) -> dict[str, str]:
    return {"configure": given.configure, "write": given.write, "read": given.read}


def topic_rights() -> Iterator[tuple[str, str, str, str]]:
    for name, (given, _) in USERS.items():
        for topic in given.topics:
            yield name, topic.exchange, topic.write, topic.read


def test_queues_exchanges_and_bindings_are_those_that_setup_declares(production):
    queues = {queue.name for topology in TOPOLOGIES.values() for queue in topology.queues}
    bindings = {
        (binding.exchange, binding.routing_key, binding.queue)
        for topology in TOPOLOGIES.values()
        for binding in topology.bindings
    }

    assert {each["name"] for each in specs(production, "Exchange")} == set(EXCHANGES)
    found = specs(production, "Queue")
    assert {each["name"] for each in found} == queues
    assert all((each["type"], each["durable"], each["deletionPolicy"]) == ("quorum", True, "retain") for each in found)
    assert {
        (each["source"], each["routingKey"], each["destination"]) for each in specs(production, "Binding")
    } == bindings


def test_policies_are_those_that_setup_sets(production):
    """Else the operator and setup would take turns in changing them."""
    found = {
        each["name"]: (each["pattern"], each["definition"], each["applyTo"]) for each in specs(production, "Policy")
    }

    assert found == {
        policy.name: (policy.pattern, dict(policy.definition), "queues")
        for topology in TOPOLOGIES.values()
        for policy in topology.policies
    }


def test_users_have_exactly_the_rights_that_the_library_gives_them(production):
    users = {each["importCredentialsSecret"]["name"]: each.get("tags", []) for each in specs(production, "User")}
    given = {each["userReference"]["name"]: each["permissions"] for each in specs(production, "Permission")}
    topics = {
        (each["userReference"]["name"], *(each["permissions"][key] for key in ("exchange", "write", "read")))
        for each in specs(production, "TopicPermission")
    }

    assert users == {f"taskmesh-rabbitmq-{name}": tags for name, (_, tags) in USERS.items()}
    assert given == {name: rights(it) for name, (it, _) in USERS.items()}
    assert topics == set(topic_rights())


def test_the_brokers_definitions_of_a_laptop_give_the_same_rights():
    definitions = json.loads((LOCAL / "rabbitmq" / "definitions.json").read_text())
    mesh = {each["name"]: each["tags"] for each in definitions["users"] if each["name"] != "taskmesh_admin"}

    assert mesh == {name: tags for name, (_, tags) in USERS.items()}
    assert {
        each["user"]: {key: each[key] for key in ("configure", "write", "read")}
        for each in definitions["permissions"]
        if each["user"] != "taskmesh_admin"
    } == {name: rights(given) for name, (given, _) in USERS.items()}
    assert {
        (each["user"], each["exchange"], each["write"], each["read"]) for each in definitions["topic_permissions"]
    } == set(topic_rights())


def test_a_right_too_many_is_caught(production):
    named(production, "Permission", "email")["spec"]["permissions"]["read"] = ".*"

    with pytest.raises(AssertionError):
        test_users_have_exactly_the_rights_that_the_library_gives_them(production)


def test_a_policy_that_differs_from_setups_is_caught(production):
    [policy] = [each for each in of_kind(production, "Policy") if each["metadata"]["name"] == "billing"]
    policy["spec"]["definition"]["delivery-limit"] = 20

    with pytest.raises(AssertionError):
        test_policies_are_those_that_setup_sets(production)


def grants(service: str) -> list[str]:
    names = {"database": service, "owner": f"{service}_owner", "user": service}
    return [statement.format(**names) for statement in (*DATABASE_GRANTS, *SCHEMA_GRANTS)]


@pytest.mark.parametrize("service", SERVICES)
def test_each_database_has_the_two_roles_that_the_library_makes(production, service):
    cluster = named(production, "Cluster", f"{service}-db")["spec"]
    initdb = cluster["bootstrap"]["initdb"]

    assert (initdb["database"], initdb["owner"]) == (service, f"{service}_owner")
    assert initdb["postInitApplicationSQL"] == [f"CREATE ROLE {service} LOGIN", *grants(service)]
    assert [role["name"] for role in cluster["managed"]["roles"]] == [service]
    assert (cluster["instances"], cluster["postgresql"]["synchronous"]) == (3, {"method": "any", "number": 1})
    pooler = named(production, "Pooler", f"{service}-db-pooler")["spec"]
    # LISTEN and advisory locks need a session of their own.
    assert pooler["pgbouncer"]["poolMode"] == "session"


@pytest.mark.parametrize("service", SERVICES)
def test_a_certificate_names_the_pooler_too_or_nobody_who_checks_it_gets_in(production, service):
    """The operator makes it out to the cluster's own services; those of poolers are the cluster's to list."""
    pooler = named(production, "Pooler", f"{service}-db-pooler")
    cluster = named(production, "Cluster", pooler["spec"]["cluster"]["name"])
    name, namespace = (pooler["metadata"][key] for key in ("name", "namespace"))

    assert cluster["spec"]["certificates"]["serverAltDNSNames"] == [
        name,
        f"{name}.{namespace}",
        f"{name}.{namespace}.svc",
    ]


def test_the_databases_of_a_laptop_have_the_same_two_roles():
    script = (LOCAL / "postgres" / "databases.sql").read_text()
    statements = [line.rstrip(";") for line in script.splitlines() if line and not line.startswith("--")]

    for service in SERVICES:
        start = statements.index(f"CREATE ROLE {service}_owner LOGIN PASSWORD 'dev'")
        made = [each for each in statements[start + 3 : start + 12] if not each.startswith("\\")]
        assert made == grants(service)


def test_the_broker_survives_the_loss_of_a_node(production):
    broker = named(production, "RabbitmqCluster", "rabbitmq")["spec"]
    configuration = dict(
        line.split(" = ") for line in broker["rabbitmq"]["additionalConfig"].splitlines() if not line.startswith("#")
    )

    assert broker["replicas"] == 3
    assert broker["resources"]["requests"]["memory"] == broker["resources"]["limits"]["memory"]
    assert configuration["cluster_partition_handling"] == "pause_minority"
    assert (
        int(configuration["consumer_timeout"])
        > max(task.time_limit for task in email.tasks.values() if task.time_limit) * 1000
    )
    assert yaml.safe_load(str(broker["tls"]["disableNonTLSListeners"])) is True
