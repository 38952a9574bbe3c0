"""What a load asks of the parts that all workers share: processors, connections, messages, rows and bytes."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from taskmesh.planning.costs import Kind, measured

HEADROOM = 0.7
"""The share of a processor that may be planned with; beyond it, waits grow fast."""
RELAY_CONNECTIONS = 3
"""Of one relay to its database: one listens, two work."""
TASK_CONNECTIONS = 2
"""Of one slot: a task that calls others holds its lock on one and works on the other."""
MEMORY_MARGIN = 1.5
"""From what a fresh process uses to what a pod is allowed."""
DAY_SECONDS = 86_400
MEBIBYTE = 1024**2
GIBIBYTE = 1024**3


class Part(BaseModel):
    """A kind of process or server.

    Attributes:
        cpu_ms: On a CPU, for each task.
        cores: That the peak keeps busy.
        processes: How many it takes, where one process uses one core at most; None where it uses as many as there are.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    cpu_ms: float
    cores: float
    processes: int | None


class Demands(BaseModel):
    """Of one service at its peak, unless a name says otherwise; its rows are those of the gateway and the service."""

    model_config = ConfigDict(frozen=True)

    parts: tuple[Part, ...]
    messages_per_second: float
    commits_per_second: float
    rows_per_second: float
    wal_mib_per_second: float
    kept_gib: float
    wal_gib_per_day: float
    service_database_connections: int
    broker_connections: int
    pod_memory_mib: int
    workers_memory_gib: float


def demands(
    kind: Kind, *, rate: float, peak: float, pods: int, concurrency: int, processes: bool, retention_days: float
) -> Demands:
    """Multiply what was measured; `processes` tells whether each slot is a process of its own."""
    each = 1 / kind.tasks
    memory = pod_memory_mib(concurrency, processes=processes)
    day = rate * DAY_SECONDS
    return Demands(
        parts=tuple(_part(name, cpu * each, peak) for name, cpu in cpu_by_part(kind).items()),
        messages_per_second=sum(kind.published.values()) * each * peak,
        commits_per_second=sum(kind.commits.values()) * each * peak,
        rows_per_second=sum(kind.rows.values()) * each * peak,
        wal_mib_per_second=kind.wal * each * peak / MEBIBYTE,
        kept_gib=sum(kind.kept.values()) * each * day * retention_days / GIBIBYTE,
        wal_gib_per_day=kind.wal * each * day / GIBIBYTE,
        # The relay runs as two replicas; a worker's main process has one connection more.
        service_database_connections=pods * (TASK_CONNECTIONS * concurrency + 1) + 2 * RELAY_CONNECTIONS,
        # A worker consumes on one connection and reports on another; a relay publishes on one, and takes control.
        broker_connections=2 * pods + 2 * 2,
        pod_memory_mib=memory,
        workers_memory_gib=pods * memory / 1024,
    )


def cpu_by_part(kind: Kind) -> dict[str, float]:
    """Milliseconds on a CPU for one root task, by part; the services' own workers and relays are added up."""
    added: dict[str, float] = {}
    for name, cpu in kind.cpu.items():
        service, _, role = name.partition("-")
        part = name if service == "gateway" or not role else role
        added[part] = added.get(part, 0.0) + cpu
    return {part: cpu for part, cpu in added.items() if part not in ("gateway-scheduler", "gateway-reconciler")}


def pod_memory_mib(concurrency: int, *, processes: bool) -> int:
    """The memory limit of a worker pod, in steps of 64 MiB: its main process, and a child for each slot of prefork."""
    trees = [sizes for name, sizes in measured().memory_mb.items() if name.endswith("-worker")]
    main = max(sizes[0] for sizes in trees)
    child = max(size for sizes in trees for size in sizes[1:])
    # Threads share the modules that a child has loaded, and one child's worth is what tasks themselves take.
    used = main + child * (concurrency if processes else 1)
    return math.ceil(used * MEMORY_MARGIN / 64) * 64


def _part(name: str, cpu_ms: float, peak: float) -> Part:
    cores = cpu_ms * peak / 1000
    shared = name in ("postgres", "rabbitmq", "worker")
    return Part(
        name=name, cpu_ms=cpu_ms, cores=cores, processes=None if shared else max(math.ceil(cores / HEADROOM), 1)
    )
