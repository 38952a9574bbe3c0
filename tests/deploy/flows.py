"""Who may talk to whom, by the network policies: Kubernetes' own rules, as far as the manifests use them.

https://kubernetes.io/docs/concepts/services-networking/network-policies/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from manifests import Documents, Resource, of_kind


@dataclass(frozen=True)
class Place:
    """A pod, or an address outside the cluster."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: dict[str, str] = field(default_factory=dict, hash=False)
    address: str = ""


class Network:
    """The policies of a namespace, and what they let pass."""

    def __init__(self, documents: Documents) -> None:
        self._policies = of_kind(documents, "NetworkPolicy")
        self._rules: dict[tuple[str, str], list[Resource] | None] = {}

    def lets(self, source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
        """True if every policy that has a say lets a connection pass."""
        return self._one_way("Egress", source, target, port, protocol) and self._one_way(
            "Ingress", target, source, port, protocol
        )

    def _one_way(self, way: str, at: Place, other: Place, port: int, protocol: str) -> bool:
        rules = self._rules_at(way, at)
        peers = "to" if way == "Egress" else "from"
        return rules is None or any(
            _has_port(rule, port, protocol) and _has_peer(rule.get(peers), at.namespace, other) for rule in rules
        )

    def _rules_at(self, way: str, at: Place) -> list[Resource] | None:
        """The rules of all policies that select a pod; None if none does, so that everything passes."""
        if (at.name, way) not in self._rules:
            specs = [
                each["spec"]
                for each in self._policies
                if each["metadata"]["namespace"] == at.namespace
                and way in _ways(each["spec"])
                and _matches(each["spec"].get("podSelector", {}), at.labels)
            ]
            rules = [rule for spec in specs for rule in spec.get(way.lower()) or []]
            self._rules[at.name, way] = rules if specs else None
        return self._rules[at.name, way]


def _ways(spec: Resource) -> set[str]:
    return set(spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"]))


def _has_port(rule: Resource, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each.get("protocol", "TCP") == protocol and each.get("port") in (None, port) for each in ports
    )


def _has_peer(peers: list[Resource] | None, namespace: str, other: Place) -> bool:
    return not peers or any(_is_peer(peer, namespace, other) for peer in peers)


def _is_peer(peer: Resource, namespace: str, other: Place) -> bool:
    if block := peer.get("ipBlock"):
        return bool(other.address) and _in_block(block, other.address)
    if other.address:
        return False
    if "namespaceSelector" in peer:
        in_namespace = _matches(peer["namespaceSelector"], other.namespace_labels)
    else:
        in_namespace = other.namespace == namespace
    return in_namespace and _matches(peer.get("podSelector", {}), other.labels)


def _in_block(block: Resource, address: str) -> bool:
    it = ip_address(address)
    return it in ip_network(block["cidr"]) and not any(it in ip_network(each) for each in block.get("except", []))


def _matches(selector: Resource, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels") or {}
    return wanted.items() <= labels.items() and all(
        _meets(each, labels) for each in selector.get("matchExpressions", [])
    )


def _meets(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(other)


def pods_of(documents: Documents, *kinds: str) -> Iterator[Place]:
    """The pods of the workloads."""
    for each in of_kind(documents, *kinds):
        labels = each["spec"]["template"]["metadata"]["labels"]
        namespace = each["metadata"]["namespace"]
        yield Place(each["metadata"]["name"], namespace, labels, {"kubernetes.io/metadata.name": namespace})
