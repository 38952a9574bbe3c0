"""Starts again what has ended, a moment later, as a kubelet does."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from taskmesh.parts.processes import Process, log_end
from taskmesh_local.faults.journal import Journal
from taskmesh_local.folders import Folders
from taskmesh_local.mesh import Mesh
from taskmesh_local.state import State

LOOK_SECONDS = 0.25
BACKOFF_SECONDS = 1.0
"""How long a role that ended by itself stays down."""


class Supervisor:
    """Keeps the roles of a mesh running.

    Args:
        mesh: Starts them.
        state: Knows their processes.
        roles: Their names.
        journal: Is told of every role that ended without having been killed.
    """

    def __init__(self, mesh: Mesh, state: State, roles: Sequence[str], journal: Journal) -> None:
        self._mesh = mesh
        self._state = state
        self._folders: Folders = state.folders
        self._roles = tuple(roles)
        self._journal = journal
        self._not_before: dict[str, float] = {}
        self.restarts: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()

    def process(self, role: str) -> Process | None:
        """The role's process while it runs."""
        return self._state.process(role)

    def stay_down(self, role: str, seconds: float) -> None:
        """Leave the role down for so long after its end, which is about to come and expected."""
        self._not_before[role] = time.monotonic() + seconds

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            for role in self._roles:
                if self._state.process(role) is None:
                    await self._mend(role)
            await asyncio.sleep(LOOK_SECONDS)

    async def _mend(self, role: str) -> None:
        if role not in self._not_before:
            self.unexpected[role] += 1
            last = log_end(self._folders.log(role), lines=1)
            self._journal.note(f"{role} ended by itself: {last[:160]}")
            self.stay_down(role, BACKOFF_SECONDS)
        if time.monotonic() < self._not_before[role]:
            return
        del self._not_before[role]
        self.restarts[role] += 1
        await asyncio.to_thread(self._mesh.relaunch, role)

    def standing(self) -> dict[str, bool]:
        """Whether each role is up and ready."""
        return {role: self._mesh.standing(role).is_up for role in self._roles}


async def until(probe: Callable[[], bool], *, seconds: float, every: float = 0.2) -> bool:
    """True as soon as the probe says so; False when it does not within the time."""
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(probe):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(every)
    return True
