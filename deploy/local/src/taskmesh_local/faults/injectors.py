"""Doing to the mesh what the schedule says, and undoing it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from taskmesh.errors import TaskmeshError
from taskmesh.management import Management
from taskmesh.parts.postgres import Postgres
from taskmesh.parts.processes import Process
from taskmesh.parts.rabbitmq import VHOST, RabbitMQ
from taskmesh_local.faults.journal import Journal
from taskmesh_local.faults.killed import Killed, Standstill
from taskmesh_local.faults.proxies import SLOW_BYTES_PER_SECOND, SLOW_DELAY_SECONDS, Proxies
from taskmesh_local.faults.schedule import BROKER, DATABASE, Fault, Kind
from taskmesh_local.faults.supervisor import Supervisor, until

WELL_SECONDS = 10.0
"""How long a fault waits for a victim that has not recovered from an earlier one."""
SERVER_TRIES = 3
RESTART_SECONDS = 2.0
"""What is left of a killed role is killed so long after its time, at the latest."""
NO_MEMORY = ("set_vm_memory_high_watermark", "absolute", "1MB")
ENOUGH_MEMORY = ("set_vm_memory_high_watermark", "0.4")
NO_DISK = ("set_disk_free_limit", "1000000GB")
ENOUGH_DISK = ("set_disk_free_limit", "50MB")


class NotInjected(Exception):
    """The victim could not be harmed; the message says why."""


@dataclass(slots=True)
class Injection:
    """What became of one fault."""

    fault: Fault
    effect: str = ""
    injected: bool = False


@dataclass(slots=True, eq=False)
class Injectors:
    """Injects faults into one mesh.

    Attributes:
        policies: The broker's policies as they were before.
        done: Every fault so far, with its effect.
        killed: Every process that was killed on purpose, but for the servers'.
        standstills: When roles were stopped.
    """

    supervisor: Supervisor
    proxies: Proxies
    database: Postgres
    broker: RabbitMQ
    journal: Journal
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: list[Injection] = field(default_factory=list)
    killed: list[Killed] = field(default_factory=list)
    standstills: list[Standstill] = field(default_factory=list)
    _stopped: dict[str, list[Process]] = field(default_factory=dict)

    async def run(self, faults: Sequence[Fault]) -> None:
        """Inject each fault at its time; returns when the last one is over."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, fault.at - self.journal.seconds))
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        injection = Injection(fault)
        self.done.append(injection)
        try:
            injection.effect = await self._begin(fault)
        except (NotInjected, OSError, subprocess.CalledProcessError, TaskmeshError) as error:
            injection.effect = f"not injected: {error}"
            self.journal.note(f"{fault.kind} {fault.victim}: {injection.effect}")
            return
        injection.injected = True
        self.journal.note(f"{fault.kind} {fault.victim} for {fault.seconds:.1f} s: {injection.effect}")
        await asyncio.sleep(fault.seconds)
        try:
            await self._end(fault)
        except (OSError, subprocess.CalledProcessError, TaskmeshError) as error:
            # What is left of it is undone in the end.
            self.journal.note(f"{fault.kind} {fault.victim}: not undone yet, {error}")

    async def _begin(self, fault: Fault) -> str:  # noqa: PLR0911 - one per kind
        match fault.kind:
            case Kind.KILL:
                return await self._kill(fault)
            case Kind.KILL_CHILD:
                return await self._kill_child(fault)
            case Kind.STOP:
                return await self._stop(fault)
            case Kind.CUT:
                return f"{self.proxies.of[fault.victim].cut()} connections reset"
            case Kind.BLACK_HOLE:
                return f"{self.proxies.of[fault.victim].swallow()} connections held"
            case Kind.SLOW:
                connections = self.proxies.of[fault.victim].slow_down(SLOW_DELAY_SECONDS, SLOW_BYTES_PER_SECOND)
                return f"{connections} connections slowed down"
            case Kind.MEMORY_ALARM:
                return await self._alarm(NO_MEMORY, "mem_alarm")
            case Kind.DISK_ALARM:
                return await self._alarm(NO_DISK, "disk_free_alarm")
            case Kind.FULL_QUEUE:
                return await asyncio.to_thread(self._fill, fault.victim)

    async def _end(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL if fault.victim in {BROKER, DATABASE}:
                await asyncio.to_thread(self._start_server, fault.victim)
            case Kind.STOP:
                await self._go_on(fault)
            case Kind.BLACK_HOLE:
                proxy = self.proxies.of[fault.victim]
                if fault.badly:
                    proxy.cut()
                proxy.resume()
            case Kind.SLOW:
                self.proxies.of[fault.victim].speed_up()
            case Kind.MEMORY_ALARM:
                await asyncio.to_thread(self.broker.control, *ENOUGH_MEMORY)
            case Kind.DISK_ALARM:
                await asyncio.to_thread(self.broker.control, *ENOUGH_DISK)
            case Kind.FULL_QUEUE:
                await asyncio.to_thread(self._put_policies, [fault.victim])
            case _:
                pass

    async def _kill(self, fault: Fault) -> str:
        process = await self._victim(fault.victim)
        if fault.victim not in {BROKER, DATABASE}:
            self.supervisor.stay_down(fault.victim, fault.seconds)
            # What it leaves behind ends with it, or is killed before it is started again.
            self._note_killed(fault.victim, [process.pid, *process.children()], later_seconds=fault.seconds)
        # The process alone: its children are left behind, as a worker's are when the kernel kills it for its memory.
        process.send(signal.SIGKILL)
        gone = await until(lambda: not process.is_running(), seconds=5)
        return f"pid {process.pid} gone" if gone else f"pid {process.pid} is still there"

    async def _kill_child(self, fault: Fault) -> str:
        process = await self._victim(fault.victim)
        children: list[int] = []

        def born() -> bool:
            # Kept as they are seen: in the next moment they may be gone.
            children[:] = process.children()
            return bool(children)

        # Right after its start it has none yet.
        if not await until(born, seconds=WELL_SECONDS):
            raise NotInjected("it has no children")
        child = children[fault.pick % len(children)]
        self._note_killed(fault.victim, [child])
        _signal(child, signal.SIGKILL)
        return f"child {child} of {len(children)} killed"

    async def _stop(self, fault: Fault) -> str:
        process = await self._victim(fault.victim)
        stopped = [process]
        if fault.victim == DATABASE:
            stopped += [Process.of(pid) for pid in process.children()]
        self._stopped[fault.victim] = stopped
        for each in stopped:
            each.send(signal.SIGSTOP)
        return f"{len(stopped)} processes stopped, the first is {process.pid}"

    async def _go_on(self, fault: Fault) -> None:
        stopped = self._stopped.pop(fault.victim, [])
        if fault.badly:
            self.supervisor.stay_down(fault.victim, 0.5)
            # It has not exported anything since it was stopped.
            pids = [stopped[0].pid, *stopped[0].children()]
            self._note_killed(fault.victim, pids, earlier_seconds=fault.seconds, later_seconds=RESTART_SECONDS)
            stopped[0].send(signal.SIGKILL)
        now = time.time()
        self.standstills.append(Standstill(role=fault.victim, begin=now - fault.seconds, end=now))
        for process in stopped:
            process.send(signal.SIGCONT)

    def _note_killed(
        self, role: str, pids: Sequence[int], *, earlier_seconds: float = 0.0, later_seconds: float = 0.0
    ) -> None:
        now = time.time()
        at = now + (later_seconds + RESTART_SECONDS if later_seconds else 0.0)
        self.killed += [Killed(role=role, pid=pid, since=now - earlier_seconds, at=at) for pid in pids]

    async def _alarm(self, words: Sequence[str], sign: str) -> str:
        await self._victim(BROKER)
        await asyncio.to_thread(self.broker.control, *words)
        raised = await until(lambda: self._has_alarm(sign), seconds=8)
        return "the broker takes nothing from publishers" if raised else "set, and not seen yet"

    def _has_alarm(self, sign: str) -> bool:
        with Management(self.broker.management_url) as management, suppress(TaskmeshError):
            return any(node.get(sign) for node in management.nodes())
        return False

    def _fill(self, queue: str) -> str:
        policy = self.policies[queue]
        with Management(self.broker.management_url) as management:
            depth = int(management.queue(VHOST, queue).get("messages", 0))
            _put(management, policy, {"max-length": 1})
        return f"takes nothing beyond 1 message; it holds {depth}"

    def keep_policies(self) -> None:
        """Remember the policies that are to be put back."""
        with Management(self.broker.management_url) as management:
            self.policies = {policy["name"]: policy for policy in management.policies(VHOST)}

    def _put_policies(self, names: Sequence[str]) -> None:
        with Management(self.broker.management_url) as management:
            for name in names:
                _put(management, self.policies[name], {})

    def _start_server(self, name: str) -> None:
        server: Postgres | RabbitMQ = self.database if name == DATABASE else self.broker
        for tries in range(1, SERVER_TRIES + 1):
            try:
                server.start()
            except TaskmeshError as error:
                self.journal.note(f"{name} did not start: {error}")
                if tries == SERVER_TRIES:
                    raise
            else:
                self.journal.note(f"{name} is back")
                return

    async def _victim(self, name: str) -> Process:
        """The victim's process, waited for if it is only just coming back."""
        find: Callable[[], Process | None] = {
            BROKER: lambda: self.broker.process,
            DATABASE: lambda: self.database.process,
        }.get(name, lambda: self.supervisor.process(name))
        if not await until(lambda: find() is not None, seconds=WELL_SECONDS):
            raise NotInjected(f"{name} is down")
        process = find()
        if process is None:
            raise NotInjected(f"{name} has just ended")
        return process

    async def heal(self) -> None:
        """Undo whatever is left of any fault."""
        self.proxies.heal()
        for stopped in self._stopped.values():
            for process in stopped:
                process.send(signal.SIGCONT)
        self._stopped.clear()
        await asyncio.gather(*(asyncio.to_thread(self._start_server, name) for name in (BROKER, DATABASE)))
        await asyncio.to_thread(self.broker.control, *ENOUGH_MEMORY)
        await asyncio.to_thread(self.broker.control, *ENOUGH_DISK)
        await asyncio.to_thread(self._put_policies, tuple(self.policies))


def _put(management: Management, policy: dict[str, Any], changes: dict[str, Any]) -> None:
    management.put_policy(
        VHOST,
        policy["name"],
        pattern=policy["pattern"],
        definition=policy["definition"] | changes,
        apply_to=policy["apply-to"],
        priority=policy["priority"],
    )


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
