"""The names of the mesh's exchanges, and of its services' queues; what is bound to what is in `taskmesh.topology`."""

from __future__ import annotations

from taskmesh.contracts.lifecycle import TaskKind

COMMANDS = "taskmesh.commands"
EVENTS = "taskmesh.events"
LIFECYCLE = "taskmesh.lifecycle"
DIRECT = "taskmesh.direct"
DEAD = "taskmesh.dead"


def queue_of(service: str, kind: TaskKind) -> str:
    """Events have a queue of their own, so that a flood of them does not delay commands."""
    return f"{service}.events" if kind is TaskKind.EVENT else service
