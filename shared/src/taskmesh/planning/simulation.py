"""A worker under load, second by second, with the rules of KEDA and the HPA.

Tasks are simulated one by one: each becomes due, leaves its outbox, waits in the queue, and runs in the slot that is
free first. Decisions fall on whole seconds. The same seed gives the same run.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from taskmesh.planning.autoscaling import (
    SYNC_SECONDS,
    HorizontalPodAutoscaler,
    Keda,
    Pods,
    Reading,
    ScaledObject,
    desired_by_utilisation,
)
from taskmesh.planning.fleet import Fleet, PodSpec, Run
from taskmesh.planning.load import Load, spread
from taskmesh.planning.outcome import Outcome, Point, Recorder

QUEUE_LIMIT = 1_000_000
"""The policy's `max-length`."""
LOOK_AHEAD_SECONDS = 60.0
"""Work that is due within this time is outstanding already."""
ESTIMATE_SECONDS = 300.0
"""The memory of the mean run time, from which outstanding work is estimated."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands between a task and its worker.

    Attributes:
        relay_per_second: Messages that the relays publish, at most.
        queue_limit: Messages that the queue takes, with those that run; the others stay in their outbox.
        lag_seconds: How old the figures of the queue, and of the work outstanding, may be.
        blind_seconds: How long RabbitMQ says 0 of a queue after it has come back.
    """

    relay_per_second: int = 5_000
    queue_limit: int = QUEUE_LIMIT
    lag_seconds: int = 5
    blind_seconds: int = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """What an autoscaler can know; None stands for a source that fails.

    Attributes:
        cpu: Slots that are busy on a processor, so many as if no run waited for a slow provider.
    """

    messages: float | None
    work_seconds: float | None
    cpu: float
    ready: int
    starting: int


class Scaler(Protocol):
    """Decides about the number of replicas."""

    polling_seconds: float

    def poll(self, now: float, replicas: int, seen: Seen) -> int: ...

    def sync(self, now: float, replicas: int, seen: Seen) -> int: ...


class KedaScaler:
    """KEDA with one trigger on the queue's messages, one on the seconds of work outstanding, or both."""

    def __init__(self, spec: ScaledObject, *, queue_value: float | None, work_value: float | None) -> None:
        self.polling_seconds = spec.polling_seconds
        self._queue_value = queue_value
        self._work_value = work_value
        self._keda = Keda(spec, sum(value is not None for value in (queue_value, work_value)))

    def poll(self, now: float, replicas: int, seen: Seen) -> int:
        return self._keda.poll(now, replicas, self._readings(seen))

    def sync(self, now: float, replicas: int, seen: Seen) -> int:
        return self._keda.sync(now, replicas, self._readings(seen))

    def _readings(self, seen: Seen) -> list[Reading]:
        pairs = ((seen.messages, self._queue_value), (seen.work_seconds, self._work_value))
        return [Reading(value, target) for value, target in pairs if target is not None]


class CpuScaler:
    """An HPA on CPU alone, for comparison.

    Args:
        hpa: Its bounds and rules.
        target: The utilisation that it aims at, as a share of what a pod requests.
        pod: A pod requests what it uses with all of its slots busy.
    """

    polling_seconds = math.inf

    def __init__(self, hpa: HorizontalPodAutoscaler, *, target: float, pod: PodSpec) -> None:
        self._hpa = hpa
        self._target = target
        self._slots = pod.slots

    def poll(self, now: float, replicas: int, seen: Seen) -> int:  # noqa: ARG002 - it has no loop of its own
        return replicas

    def sync(self, now: float, replicas: int, seen: Seen) -> int:
        used = seen.cpu / (self._slots * seen.ready) if seen.ready else 0.0
        pods = Pods((min(used, 1.0),) * seen.ready, unready=seen.starting)
        return self._hpa.sync(now, replicas, [desired_by_utilisation(pods, self._target, replicas)])


@dataclass(slots=True)
class _Estimate:
    """The mean run time of late, as the gateway would know it from its ledger."""

    mean: float
    _runs: float = 0.0
    _seconds: float = 0.0

    def add(self, runs: int, seconds: float) -> None:
        kept = 1 - 1 / ESTIMATE_SECONDS
        self._runs, self._seconds = self._runs * kept + runs, self._seconds * kept + seconds
        if self._runs >= 1:
            self.mean = self._seconds / self._runs


@dataclass(slots=True)
class Simulation:
    """One run; `run()` gives its outcome."""

    load: Load
    pod: PodSpec
    scaler: Scaler
    replicas: int
    """Those that are ready when it begins."""
    around: Surroundings = field(default_factory=Surroundings)
    seed: int = 1
    _fleet: Fleet = field(init=False)
    _record: Recorder = field(init=False)
    _estimate: _Estimate = field(init=False)
    _random: Random = field(init=False)
    _spread: tuple[float, ...] = field(init=False)
    _number: int = 0
    _outbox: deque[float] = field(default_factory=deque)
    _queue: deque[float] = field(default_factory=deque)
    _later: list[tuple[float, int, Run | None]] = field(default_factory=list)
    _seen: Seen = field(default_factory=lambda: Seen(0.0, 0.0, 0.0, 0, 0))

    def run(self) -> Outcome:
        """Go through the load from its first second to its last."""
        horizon = int(self.load.seconds)
        self._random = Random(self.seed)  # noqa: S311 - a simulation, and the same one each time
        self._spread = spread(self.load.cv)
        self._number = self._random.randrange(len(self._spread))
        self._fleet = Fleet(self.pod, horizon)
        self._record = Recorder(horizon)
        self._estimate = _Estimate(self.load.run_seconds)
        self._fleet.resize(0.0, self.replicas, at_once=True)
        ahead = [at for at, count in self.load.known_ahead for _ in range(count)]
        # Each has a number of its own, below those of runs, so that no two entries are ever equal.
        self._later = [(at, number - len(ahead), None) for number, at in enumerate(ahead)]
        heapq.heapify(self._later)
        for second, arrivals in enumerate(self.load.arrivals(self._random)):
            self._second(float(second), arrivals)
        self._fleet.close(float(horizon))
        return self._record.outcome(self.load.name, self._fleet, waiting=[*self._queue, *self._outbox])

    def _second(self, now: float, arrivals: list[float]) -> None:
        self._fleet.begin(now)
        self._queue.extendleft(self._fleet.returned(now))
        due = self._due(now, arrivals)
        self._record.due(now, len(due))
        self._outbox.extend(due)
        if now not in self.load.outage:
            room = max(self.around.queue_limit - len(self._queue) - self._fleet.busy, 0)
            for _ in range(min(self.around.relay_per_second, len(self._outbox), room)):
                self._queue.append(self._outbox.popleft())
            self._dispatch(now)
        self._estimate.add(*self._fleet.end(now + 1))
        self._decide(now + 1)
        waiting = len(self._queue) + len(self._outbox)
        self._record.state(now, Point(waiting=waiting, replicas=self._fleet.replicas, ready=self._fleet.ready))

    def _due(self, now: float, arrivals: list[float]) -> list[float]:
        """What becomes due in this second: new tasks, tasks known ahead, and retries that nothing has called off."""
        if not self._later or self._later[0][0] >= now + 1:
            return arrivals
        due = list(arrivals)
        while self._later and self._later[0][0] < now + 1:
            at, _, run = heapq.heappop(self._later)
            if run is None or run.retried:
                due.append(at)
        return sorted(due)

    def _dispatch(self, now: float) -> None:
        """Start all that can start within this second."""
        fleet, queue, drawn, record = self._fleet, self._queue, self._spread, self._record
        slow = now in self.load.slow
        mean = self.load.run_seconds * (self.load.slowness if slow else 1.0)
        while queue:
            start = max(fleet.next_free(), queue[0], now)
            if start >= now + 1:
                return
            due = queue.popleft()
            self._number += 1
            run = fleet.start(start, due, mean * drawn[self._number % len(drawn)])
            record.started(start, due)
            if slow and self.load.failing and self._random.random() < self.load.failing:
                run.retried = True
                heapq.heappush(self._later, (run.ends + self.load.retry_seconds, self._number, run))

    def _decide(self, now: float) -> None:
        if now % self.around.lag_seconds == 0:
            self._seen = self._look(now)
        wanted = fleet_size = self._fleet.replicas
        if now % self.scaler.polling_seconds == 0:
            wanted = self.scaler.poll(now, wanted, self._seen)
        if now % SYNC_SECONDS == 0:
            wanted = self.scaler.sync(now, wanted, self._seen)
        if wanted != fleet_size:
            self._fleet.resize(now, wanted)

    def _look(self, now: float) -> Seen:
        fleet = self._fleet
        messages: float | None = len(self._queue) + fleet.busy
        work: float | None = self._estimate.mean * (len(self._queue) + len(self._outbox) + self._due_soon(now))
        if now in self.load.outage:
            messages = work = None
        elif 0 <= now - self.load.outage.end < self.around.blind_seconds:
            messages = 0
        # What makes a run slow is waiting: it uses no more of the processor than before, over a longer time.
        cpu = fleet.busy / (self.load.slowness if now in self.load.slow else 1.0)
        return Seen(messages, work, cpu, fleet.ready, len(fleet.starting))

    def _due_soon(self, now: float) -> int:
        until = now + LOOK_AHEAD_SECONDS
        return sum(1 for at, _, run in self._later if at < until and (run is None or run.retried))


def simulate(load: Load, pod: PodSpec, scaler: Scaler, *, replicas: int, seed: int = 1) -> Outcome:
    """Run a load once."""
    return Simulation(load, pod, scaler, replicas, seed=seed).run()
