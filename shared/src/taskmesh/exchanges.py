"""The names of the mesh's exchanges; what is bound to them is in `taskmesh.topology`."""

from __future__ import annotations

COMMANDS = "taskmesh.commands"
EVENTS = "taskmesh.events"
LIFECYCLE = "taskmesh.lifecycle"
DIRECT = "taskmesh.direct"
DEAD = "taskmesh.dead"
