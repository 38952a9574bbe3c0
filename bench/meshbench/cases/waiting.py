"""Wait for a task over HTTP: the round trip of one that finishes at once, and a stream with many listeners."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import httpx

from meshbench.contest import CPU, RATE, Column, Measured, Turn, milliseconds
from meshbench.figures import Figures, latencies
from meshbench.load import Load, apply_apart
from meshbench.mesh import BEHIND, Mesh
from meshbench.processes import Meter
from meshbench.stage import Stage
from meshbench.submissions import single
from noop_service import DoNothing

CALLERS = (1, 16)
FAR_SECONDS = 3600
LISTEN_SECONDS = 60


def waiting(stage: Stage) -> list[Measured]:
    """Both, in a mesh that does nothing else."""
    mesh = stage.mesh("prefork")
    mesh.start("api", *BEHIND)
    mesh.clear()
    trips: dict[str, Turn] = {f"{callers} at a time": partial(_round_trip, stage, mesh, callers) for callers in CALLERS}
    listeners = stage.sizes.listeners
    fans: dict[str, Turn] = {f"{listeners} listeners": lambda: asyncio.run(_fan_out(mesh, listeners))}
    return [
        Measured(
            case="wait",
            title="Submit with `Prefer: wait`, answered when the task is finished",
            columns=[milliseconds("p50", "p50"), milliseconds("p99", "p99"), RATE, CPU],
            turns=stage.contest(trips),
        ),
        Measured(
            case="stream",
            title="One task's stream, from its cancellation until its listeners know",
            columns=[
                milliseconds("p50", "p50"),
                milliseconds("p99", "p99"),
                milliseconds("max", "last"),
                Column(figure="cpu.api", title="api CPU s per 1,000 listeners", digits=2),
                Column(figure="mib.api", title="api MiB"),
            ],
            turns=stage.contest(fans),
        ),
    ]


def _round_trip(stage: Stage, mesh: Mesh, callers: int) -> Figures:
    meter = Meter(mesh.roots("api", *BEHIND))
    meter.begin()
    load = Load(
        port=mesh.port,
        headers=(*mesh.headers, "Prefer: wait=10"),
        body=single(),
        connections=callers,
        seconds=stage.seconds,
    )
    outcome = apply_apart(load)
    return {"rate": outcome.rate, **outcome.latency, **meter.figures(outcome.count, generator=outcome.cpu_seconds)}


async def _fan_out(mesh: Mesh, listeners: int) -> Figures:
    """Have everybody listen to a task that is due in an hour, cancel it, and see when each of them hears of it."""
    name, _, value = mesh.headers[0].partition(": ")
    base = f"http://127.0.0.1:{mesh.port}"
    async with httpx.AsyncClient(base_url=base, headers={name: value}, timeout=60, trust_env=False) as client:
        task = {"type": DoNothing.type_name, "payload": {}, "delay_seconds": FAR_SECONDS}
        answer = (await client.post("/v1/tasks", json=task)).raise_for_status()
        path = f"/v1/tasks/{answer.json()['id']}"
        request = f"GET {path}/events HTTP/1.1\r\nHost: bench\r\n{mesh.headers[0]}\r\n\r\n".encode()
        meter = Meter(mesh.roots("api"))
        connected = asyncio.Barrier(listeners + 1)
        heard = [asyncio.create_task(_listen(mesh.port, request, connected)) for _ in range(listeners)]
        async with asyncio.timeout(LISTEN_SECONDS):
            await connected.wait()
            meter.begin()
            begun = time.monotonic()
            (await client.post(f"{path}:cancel", json={})).raise_for_status()
            moments = await asyncio.gather(*heard)
    return {**latencies([moment - begun for moment in moments]), **meter.figures(listeners)}


async def _listen(port: int, request: bytes, connected: asyncio.Barrier) -> float:
    """When the task's end was read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await reader.readuntil(b'"scheduled"')
    await connected.wait()
    await reader.readuntil(b'"cancelled"')
    moment = time.monotonic()
    writer.close()
    return moment
