"""What one of each thing carries: the order in which a growing mesh runs into its limits."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from taskmesh.planning.costs import Kind, measured
from taskmesh.planning.demands import HEADROOM, cpu_by_part

SERVER_CORES = 16
"""A large server, for the parts that use many processors."""
QUEUE_PUBLISHES = 7_250
"""Messages a second that one quorum queue confirmed to one publisher: RabbitMQ 3.10, one node, two cores for both."""
FLUSHED_COMMITS = 2
"""Of a task at most that wait for the disk: the one that accepts it, if nobody shares it, and its outcome's."""
COUNTED = "invoice"
"""The kind of task that takes a number from a counter."""


class Basis(StrEnum):
    MEASURED = "measured"
    INFERRED = "inferred"


class Limit(BaseModel):
    """Something of which one carries so many tasks a second.

    Attributes:
        basis: Measured by itself, or inferred from what a task costs.
        change: What to do when it is not enough.
    """

    model_config = ConfigDict(frozen=True)

    what: str
    tasks_per_second: float
    basis: Basis
    change: str


def limits(kind: Kind, *, counted: bool) -> tuple[Limit, ...]:
    """Limits by the rate at which they are reached, the lowest first; `counted` tasks take a number each."""
    found = [*_processors(kind), *_locks(kind, counted=counted)]
    return tuple(sorted(found, key=lambda limit: limit.tasks_per_second))


def _processors(kind: Kind) -> list[Limit]:
    cpu = cpu_by_part(kind)
    return [
        Limit(
            what=what,
            tasks_per_second=round(cores * HEADROOM * 1000 * kind.tasks / max(cpu[part], 1e-3), 1),
            basis=Basis.INFERRED,
            change=change,
        )
        for part, cores, what, change in (
            ("worker", 1, "a core for workers", "more pods: the ScaledObject sees to it"),
            ("relay", 1, "a relay of the service", "more replicas share its outbox"),
            ("gateway-projector", 1, "a projector", "more replicas share its queue"),
            ("gateway-api", 1, "an api process", "more replicas, and batches"),
            ("gateway-relay", 1, "a relay of the gateway", "more replicas share its outbox"),
            ("postgres", SERVER_CORES, f"PostgreSQL on {SERVER_CORES} cores", "a server for each service"),
            ("rabbitmq", SERVER_CORES, f"RabbitMQ on {SERVER_CORES} cores", "three nodes, then brokers by service"),
        )
    ]


def _locks(kind: Kind, *, counted: bool) -> list[Limit]:
    commits = measured().commits_per_second
    found = [
        Limit(
            what="a PostgreSQL server's commits",
            tasks_per_second=round(commits["side_by_side"] / FLUSHED_COMMITS, 1),
            basis=Basis.MEASURED,
            change="a faster disk, a server for each service",
        ),
        Limit(
            what="a quorum queue",
            tasks_per_second=QUEUE_PUBLISHES,
            basis=Basis.MEASURED,
            change="several queues by hash of the task id",
        ),
    ]
    if counted:
        numbers = Limit(
            what="a series of invoice numbers",
            tasks_per_second=round(commits["one_counter"] * kind.tasks, 1),
            basis=Basis.MEASURED,
            change="more series: by seller or by branch",
        )
        found.append(numbers)
    return found
