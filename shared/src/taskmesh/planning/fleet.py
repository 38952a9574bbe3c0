"""The pods of a simulated worker: they start, take tasks, stop, and give back what they cannot end in time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PodSpec:
    """What a pod of the worker is like.

    Attributes:
        slots: Tasks that it runs at a time. It holds no message beyond those (prefetch 1 for each slot).
        startup_seconds: From its creation to its first task: scheduling, image, imports, connections.
        soft_shutdown_seconds: How long running tasks may go on after SIGTERM before their messages go back.
        grace_seconds: From SIGTERM to SIGKILL.
    """

    slots: int
    startup_seconds: float = 20.0
    soft_shutdown_seconds: float = 20.0
    grace_seconds: float = 90.0


@dataclass(slots=True, eq=False)
class Run:
    """A task in a slot."""

    due: float = 0.0
    started: float = -math.inf
    ends: float = -math.inf
    retried: bool = False
    """It ends in a retry."""


@dataclass(slots=True, eq=False)
class Pod:
    created_at: float
    ready_at: float
    runs: list[Run]
    ready: bool = False
    stopping: bool = False


@dataclass(slots=True)
class Fleet:
    """All pods of the worker.

    Attributes:
        free: One entry for each slot of a ready pod: when it is free, a number that breaks ties, pod, index.
        busy: Tasks that run.
        pod_seconds: What all pods that are gone have lived, together.
        handed_back: Runs that were interrupted at the end of the soft shutdown: they run again.
        killed: Runs that SIGKILL interrupted: they run again, and the start has cost an attempt.
        lost_seconds: What interrupted runs had done.
    """

    spec: PodSpec
    horizon: int
    pods: list[Pod] = field(default_factory=list)
    starting: deque[Pod] = field(default_factory=deque)
    free: list[tuple[float, int, Pod, int]] = field(default_factory=list)
    busy: int = 0
    busy_seconds: float = 0.0
    pod_seconds: float = 0.0
    handed_back: int = 0
    killed: int = 0
    lost_seconds: float = 0.0
    _ending: list[int] = field(default_factory=list)
    _ended_seconds: list[float] = field(default_factory=list)
    _returns: list[tuple[float, float]] = field(default_factory=list)
    _serial: int = 0
    _counted: int = 0

    def __post_init__(self) -> None:
        self._ending = [0] * (self.horizon + 2)
        self._ended_seconds = [0.0] * (self.horizon + 2)

    @property
    def replicas(self) -> int:
        """Pods that are there and have not been told to stop."""
        return len(self.pods)

    @property
    def ready(self) -> int:
        return len(self.pods) - len(self.starting)

    def resize(self, now: float, wanted: int, *, at_once: bool = False) -> None:
        """Have `wanted` pods; new ones are ready after their start-up, or at once."""
        for _ in range(wanted - len(self.pods)):
            ready_at = now if at_once else now + self.spec.startup_seconds
            pod = Pod(now, ready_at, [Run() for _ in range(self.spec.slots)])
            self.pods.append(pod)
            self.starting.append(pod)
        if wanted < len(self.pods):
            # The ReplicaSet's choice: first those that are not ready, then those that became ready last.
            for pod in self.pods[wanted:]:
                self._stop(now, pod)
            del self.pods[wanted:]

    def begin(self, now: float) -> None:
        """Pods that have started up by now take tasks."""
        while self.starting and self.starting[0].ready_at <= now:
            pod = self.starting.popleft()
            pod.ready = True
            for index in range(self.spec.slots):
                self._serial += 1
                heapq.heappush(self.free, (pod.ready_at, self._serial, pod, index))

    def end(self, now: float) -> tuple[int, float]:
        """Runs have ended in the second that ends now: how many, and the seconds that they took."""
        self._counted = int(now)
        ended = self._ending[self._counted]
        self.busy -= ended
        return ended, self._ended_seconds[self._counted]

    def returned(self, now: float) -> list[float]:
        """The due times of interrupted tasks whose messages are in the queue again, the earliest due last."""
        back = []
        while self._returns and self._returns[0][0] <= now:
            back.append(heapq.heappop(self._returns)[1])
        return sorted(back, reverse=True)

    def start(self, at: float, due: float, seconds: float) -> Run:
        """Run a task in the slot that is free first, which must be free by then."""
        _, _, pod, index = self.free[0]
        self._serial += 1
        ends = at + seconds
        heapq.heapreplace(self.free, (ends, self._serial, pod, index))
        run = pod.runs[index] = Run(due, at, ends)
        self.busy += 1
        self.busy_seconds += seconds
        self._count(ends, 1, seconds)
        return run

    def next_free(self) -> float:
        """When the next slot is free; those of pods that stop are no slots any more."""
        while self.free and self.free[0][2].stopping:
            heapq.heappop(self.free)
        return self.free[0][0] if self.free else math.inf

    def close(self, now: float) -> None:
        """Count what the pods have lived that are still there, and no run beyond the end."""
        for pod in self.pods:
            self.pod_seconds += now - pod.created_at
            self.busy_seconds -= sum(max(run.ends - now, 0.0) for run in pod.runs)

    def _stop(self, now: float, pod: Pod) -> None:
        pod.stopping = True
        if not pod.ready:
            self.starting.remove(pod)
        limit = now + min(self.spec.soft_shutdown_seconds, self.spec.grace_seconds)
        running = [run for run in pod.runs if run.ends > now]
        for run in running:
            if run.ends > limit:
                self._interrupt(run, limit)
        self.pod_seconds += max([now, *(run.ends for run in running)]) - pod.created_at

    def _interrupt(self, run: Run, at: float) -> None:
        if self.spec.grace_seconds <= self.spec.soft_shutdown_seconds:
            self.killed += 1
        else:
            self.handed_back += 1
        self._count(run.ends, -1, run.started - run.ends)
        self._count(at, 1, 0.0)
        self.busy_seconds -= run.ends - at
        self.lost_seconds += at - run.started
        heapq.heappush(self._returns, (at, run.due))
        run.ends, run.retried = at, False

    def _count(self, ends: float, runs: int, seconds: float) -> None:
        second = min(max(math.ceil(ends), self._counted + 1), self.horizon + 1)
        self._ending[second] += runs
        self._ended_seconds[second] += seconds
