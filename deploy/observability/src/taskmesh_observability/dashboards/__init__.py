"""The four dashboards, from the mesh as a whole to one task type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from taskmesh_observability.dashboards import guarantees, mesh, service, task_type

DASHBOARDS: Final[Mapping[str, Dashboard]] = {
    "mesh.json": mesh.DASHBOARD,
    "service.json": service.DASHBOARD,
    "task-type.json": task_type.DASHBOARD,
    "guarantees.json": guarantees.DASHBOARD,
}
"""By the names of their files."""
