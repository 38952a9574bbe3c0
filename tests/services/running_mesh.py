"""A gateway and the orders service, all of it exporting to one collector and logging JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from memory import children_of
from running_gateway import Gateway, running_gateway
from running_orders import SERVICE, Orders, Server, orders_service
from taskmesh.testing.waiting import eventually

SCOPES = (
    "tasks:write,tasks:read,types:read,schedules:read,schedules:write,services:write,"
    "dead-letters:read,dead-letters:write,reconciliation:read,reconciliation:write"
)


@dataclass
class Mesh:
    """The running processes, and what they say."""

    gateway: Gateway
    orders: Orders

    @cached_property
    def http(self) -> httpx.Client:
        """A caller who may do everything."""
        return self.gateway.http(SCOPES)

    def wait_until_announced(self, type_name: str) -> None:
        """Return once the gateway takes tasks of the type."""
        eventually(lambda: self.http.get(f"/v1/types/{type_name}").status_code == httpx.codes.OK)

    def submit(self, type_name: str, payload: dict[str, Any] | None = None, **fields: Any) -> str:
        """Have a task accepted; returns its id."""
        body = {"type": type_name, "payload": payload or {}, **fields}
        return str(self.http.post("/v1/tasks", json=body).raise_for_status().json()["id"])

    def processes(self) -> dict[str, int]:
        """The pid of each process, the children of the pool included."""
        found = {f"gateway {role}": process.pid for role, process in self.gateway.processes.items()}
        found |= {f"orders {role}": process.pid for role, process in self.orders.processes.items()}
        if "orders worker" in found:
            children = sorted(children_of(found["orders worker"]))
            found |= {f"orders child {number}": pid for number, pid in enumerate(children)}
        return found

    def output(self) -> dict[str, str]:
        """All that each process has written, by the name of its log."""
        logs = [log for folder in (self.gateway.folder, self.orders.health) for log in folder.glob("*.log")]
        return {log.name: log.read_text() for log in logs}

    def log_lines(self) -> list[dict[str, Any]]:
        """What all processes have logged."""
        lines = [line for text in self.output().values() for line in text.splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]


@contextlib.contextmanager
def running_mesh(
    postgres: str,
    rabbitmq: Server,
    folder: Path,
    *roles: str,
    endpoint: str | None = None,
    script: Path = SERVICE,
    **variables: str,
) -> Iterator[Mesh]:
    """Run gateway and service until the end of the block.

    Args:
        postgres: The administrator's URL.
        rabbitmq: The broker's administrator.
        folder: For logs and health files.
        roles: Of the gateway; the service has relay and worker.
        endpoint: Of the collector.
        script: The service's program.
        variables: More environment variables, of all processes.
    """
    folders = [folder / "orders", folder / "gateway"]
    for each in folders:
        each.mkdir()
    telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if endpoint else {}
    with contextlib.ExitStack() as stack:
        orders = stack.enter_context(orders_service(postgres, rabbitmq, folders[0], script=script, start=False))
        urls = (orders.amqp_url, orders.management_url)
        gateway = stack.enter_context(running_gateway(postgres, *urls, folders[1]))
        for service in (orders, gateway):
            service.environment.update(telemetry | variables)
        for role in roles:
            gateway.spawn(role)
        for role in ("relay", "worker"):
            orders.spawn(role)
        for role in roles:
            gateway.wait_until_ready(role)
        for role in ("relay", "worker"):
            orders.wait_until_ready(role)
        yield Mesh(gateway, orders)
