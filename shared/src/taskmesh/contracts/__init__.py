"""The published language of the mesh: frozen Pydantic models, one module for each service that owns types."""

from taskmesh.contracts._base import Command, Contract, Event, Part

__all__ = ["Command", "Contract", "Event", "Part"]
