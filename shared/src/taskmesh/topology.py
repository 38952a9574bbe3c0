"""The exchanges, queues, bindings, policies and rights of the mesh, as data, and the way to declare them.

| exchange             | key                              | queue                                    |
|----------------------|----------------------------------|------------------------------------------|
| `taskmesh.commands`  | task type: `billing.#`           | `billing`, the one owner                 |
| `taskmesh.events`    | exact event type                 | `<service>.events` of each listener      |
| `taskmesh.lifecycle` | `task.#`, `manifest.#`           | `gateway.lifecycle`                      |
| `taskmesh.direct`    | a queue's name                   | that queue: retries of events, control   |
| `taskmesh.dead`      | `#` (the key is the dead queue's)| `gateway.dead-letters`                   |

A service's topology also holds all exchanges, so that services may be set up in any order. A queue is declared with
nothing but its type, because arguments cannot be changed on a live queue; everything else about it is a policy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pydantic import SecretStr

from taskmesh import amqp
from taskmesh.exchanges import COMMANDS, DEAD, DIRECT, EVENTS, LIFECYCLE
from taskmesh.management import Management

logger = logging.getLogger(__name__)

EXCHANGES = (COMMANDS, EVENTS, LIFECYCLE, DEAD, DIRECT)

GATEWAY = "gateway"
LIFECYCLE_QUEUE = "gateway.lifecycle"
DEAD_QUEUE = "gateway.dead-letters"

QUEUE_ARGUMENTS: Mapping[str, Any] = {"x-queue-type": "quorum"}

WORK_DELIVERY_LIMIT = 50
"""Redeliveries before the broker dead-letters a message by itself.

Only the backstop, for a task that kills its worker before a start can be counted: what a task may cost is decided by
the count of its starts. Drains, lost connections and a worker that gives a message back because its database was away
for longer than the task's time limit are redeliveries, too, and none of the task's making: hours of that must fit.
"""

CONSUMER_DELIVERY_LIMIT = 1_000_000
"""As good as none: the gateway, and a service's relay, put messages back while their database is away, every few
seconds, and nothing of it may be lost.

A number, because RabbitMQ 3 has no word for "no limit"; and never left out, because RabbitMQ 4 then takes 20 and drops
what exceeds it from a queue without a dead-letter exchange.
"""

MAX_MESSAGES = 1_000_000
"""A full queue refuses publishes, and the outboxes hold their rows: delay instead of a full disk."""
MAX_BYTES = 4 * 1024**3
MAX_CONTROL_MESSAGES = 10_000

CONSUMER_TIMEOUT_MILLISECONDS = 24 * 60 * 60 * 1000
"""How long a consumer may hold a message; the broker's own 30 minutes would end longer tasks and run them again.

A task is ended by its time limit, and a worker that is gone is noticed by its heartbeats.
"""
POLICY_SINCE: Mapping[str, tuple[int, int]] = {"consumer-timeout": (3, 12)}
"""Policy keys that an older RabbitMQ refuses; there they are left out, and the broker's configuration has to do."""

_SERVICE = re.compile(r"[a-z][a-z0-9-]{0,62}")
_RESERVED = frozenset({GATEWAY, "taskmesh", "amq"})


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable topic exchange."""

    name: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable quorum queue."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    exchange: str
    routing_key: str
    queue: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the broker does with the queues whose name matches `pattern`; changeable while they are in use."""

    name: str
    pattern: str
    definition: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """What one service declares. Its queues have exactly these bindings to the mesh's exchanges."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]
    policies: tuple[Policy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicPermission:
    """The routing keys, as a regular expression, that a user may publish to one exchange."""

    exchange: str
    write: str
    read: str = "^$"
    """The keys it may bind a queue with; none, because only the setup role binds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """The rights of one broker user, as regular expressions over names."""

    configure: str
    write: str
    read: str
    topics: tuple[TopicPermission, ...] = ()


def gateway_topology() -> Topology:
    """Return what the gateway owns: the queue of lifecycle events and manifests, and the queue of dead letters."""
    return Topology(
        exchanges=_exchanges(),
        queues=(Queue(LIFECYCLE_QUEUE), Queue(DEAD_QUEUE)),
        bindings=(
            Binding(exchange=LIFECYCLE, routing_key="task.#", queue=LIFECYCLE_QUEUE),
            Binding(exchange=LIFECYCLE, routing_key="manifest.#", queue=LIFECYCLE_QUEUE),
            Binding(exchange=DEAD, routing_key="#", queue=DEAD_QUEUE),
        ),
        policies=(
            _policy(LIFECYCLE_QUEUE, delivery_limit=CONSUMER_DELIVERY_LIMIT),
            # Dead letters of the dead-letter queue would have nowhere to go.
            _policy(DEAD_QUEUE, delivery_limit=CONSUMER_DELIVERY_LIMIT, dead_letters=False),
        ),
    )


def worker_topology(service: str, listens_to: Iterable[str]) -> Topology:
    """Return what a worker service owns: its queues of commands, of events and of control messages.

    Args:
        service: The first word of its command types, and the name of its command queue.
        listens_to: Exact event types. Never a pattern: an event that nobody registered would be a dead letter.
    """
    commands, events, control = _worker_queues(service)
    return Topology(
        exchanges=_exchanges(),
        queues=(Queue(commands), Queue(events), Queue(control)),
        bindings=(
            Binding(exchange=COMMANDS, routing_key=f"{service}.#", queue=commands),
            *(Binding(exchange=EVENTS, routing_key=event, queue=events) for event in sorted(set(listens_to))),
            Binding(exchange=DIRECT, routing_key=commands, queue=commands),
            Binding(exchange=DIRECT, routing_key=events, queue=events),
            Binding(exchange=DIRECT, routing_key=control, queue=control),
        ),
        policies=(
            _policy(commands, delivery_limit=WORK_DELIVERY_LIMIT),
            _policy(events, delivery_limit=WORK_DELIVERY_LIMIT),
            _policy(control, delivery_limit=CONSUMER_DELIVERY_LIMIT, max_messages=MAX_CONTROL_MESSAGES),
        ),
    )


def permissions(service: str) -> Permissions:
    """Return the rights of a service's run-time broker user, which all its roles share.

    It may configure nothing. A worker service may send commands to anyone, but events, lifecycle events and manifests
    only in its own name, and directly only to its own queues. No right on `taskmesh.dead` is needed: the broker moves
    dead letters by policy.
    """
    if service == GATEWAY:
        return Permissions(
            configure="^$",
            write=r"^taskmesh\.(commands|direct|lifecycle)$",
            read=r"^gateway\.(lifecycle|dead-letters)$",
            topics=(
                TopicPermission(exchange=COMMANDS, write=".*"),
                TopicPermission(exchange=DIRECT, write=".*"),
                # For the replay of a lifecycle message that was parked.
                TopicPermission(exchange=LIFECYCLE, write=r"^(task\.[a-z]+|manifest)\.[a-z][a-z0-9-]*$"),
            ),
        )
    _worker_queues(service)
    return Permissions(
        configure="^$",
        write=r"^taskmesh\.(commands|events|lifecycle|direct)$",
        read=rf"^{service}(\.events|\.control)?$",
        topics=(
            TopicPermission(exchange=COMMANDS, write=".*"),
            TopicPermission(exchange=EVENTS, write=rf"^{service}\..+$"),
            TopicPermission(exchange=LIFECYCLE, write=rf"^(task\.[a-z]+|manifest)\.{service}$"),
            TopicPermission(exchange=DIRECT, write=rf"^{service}(\.events|\.control)?$"),
        ),
    )


def setup_permissions(service: str) -> Permissions:
    """Return the rights that the service's setup role needs; its user also needs the tag `policymaker`."""
    queues = r"gateway\.(lifecycle|dead-letters)" if service == GATEWAY else rf"{service}(\.events|\.control)?"
    exchanges = r"taskmesh\.(commands|events|lifecycle|dead|direct)"
    return Permissions(configure=f"^({exchanges}|{queues})$", write=f"^({exchanges}|{queues})$", read=f"^{exchanges}$")


def grant(management: Management, vhost: str, user: str, rights: Permissions) -> None:
    """Give a broker user exactly these rights on the virtual host."""
    management.put_permissions(vhost, user, configure=rights.configure, write=rights.write, read=rights.read)
    for topic in rights.topics:
        management.put_topic_permissions(vhost, user, exchange=topic.exchange, write=topic.write, read=topic.read)


def declare(topology: Topology, *, amqp_url: SecretStr | str, management: Management) -> None:
    """Make the broker look like the topology; repeating it changes nothing.

    Policies come first: a queue that exists before its policy would drop messages instead of dead-lettering them.
    Bindings of its queues to the mesh's exchanges that the topology does not hold are removed, after the new ones are
    in place. Queues are never removed: they may hold work.

    Raises:
        BrokerUnavailable: The broker cannot be reached.
        PermanentError: A right is missing (`amqp.BrokerRefusal`), or a queue or exchange exists with another type.
    """
    parameters = amqp.parameters(amqp_url, name="taskmesh-setup")
    release = _release(management)
    for policy in topology.policies:
        management.put_policy(
            parameters.virtual_host,
            policy.name,
            pattern=policy.pattern,
            definition={
                key: value for key, value in policy.definition.items() if POLICY_SINCE.get(key, release) <= release
            },
            apply_to="queues",
        )
    with amqp.translating():
        connection = pika.BlockingConnection(parameters)
        try:
            channel = connection.channel()
            _declare(topology, channel)
            for binding in _stale_bindings(topology, parameters.virtual_host, management):
                channel.queue_unbind(binding.queue, binding.exchange, binding.routing_key)
                logger.info(
                    "stale binding removed",
                    extra={"exchange": binding.exchange, "routing_key": binding.routing_key, "queue": binding.queue},
                )
        finally:
            if connection.is_open:
                connection.close()


def _declare(topology: Topology, channel: BlockingChannel) -> None:
    for exchange in topology.exchanges:
        channel.exchange_declare(exchange.name, exchange_type="topic", durable=True)
    for queue in topology.queues:
        channel.queue_declare(queue.name, durable=True, arguments=dict(QUEUE_ARGUMENTS))
    for binding in topology.bindings:
        channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)


def _release(management: Management) -> tuple[int, int]:
    """The first two numbers of the broker's version, such as 4.0.5."""
    major, minor = re.findall(r"\d+", management.overview()["rabbitmq_version"])[:2]
    return int(major), int(minor)


def _stale_bindings(topology: Topology, vhost: str, management: Management) -> list[Binding]:
    """Return the bindings that an earlier release declared; those from an operator's own exchange are left alone."""
    ours = {exchange.name for exchange in topology.exchanges}
    found = [
        Binding(exchange=binding["source"], routing_key=binding["routing_key"], queue=queue.name)
        for queue in topology.queues
        for binding in management.bindings(vhost, queue.name)
        if binding["source"] in ours and not binding["arguments"]
    ]
    return [binding for binding in found if binding not in topology.bindings]


def _exchanges() -> tuple[Exchange, ...]:
    return tuple(Exchange(name) for name in EXCHANGES)


def _worker_queues(service: str) -> tuple[str, str, str]:
    if not _SERVICE.fullmatch(service) or service in _RESERVED:
        raise ValueError(f"{service!r} cannot name a worker service: lower-case letters, digits and dashes")
    return service, f"{service}.events", f"{service}.control"


def _policy(queue: str, *, delivery_limit: int, dead_letters: bool = True, max_messages: int = MAX_MESSAGES) -> Policy:
    definition: dict[str, Any] = {
        "delivery-limit": delivery_limit,
        "max-length": max_messages,
        "max-length-bytes": MAX_BYTES,
        # Without it the oldest messages would be dropped; it is also what at-least-once dead-lettering requires.
        "overflow": "reject-publish",
        "consumer-timeout": CONSUMER_TIMEOUT_MILLISECONDS,
    }
    if dead_letters:
        definition |= {
            "dead-letter-exchange": DEAD,
            # The dead queue's name: who looks after it sees where it came from, and a replay knows where to send it.
            "dead-letter-routing-key": queue,
            "dead-letter-strategy": "at-least-once",
        }
    return Policy(name=queue, pattern=f"^{re.escape(queue)}$", definition=definition)
