"""What a simulation found: delays, replicas and waste, in total and over time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from taskmesh.planning.fleet import Fleet

BINS = 120
PERCENTILES = (50.0, 95.0, 99.0)


class Delays(BaseModel):
    """Seconds from due to started; 0 when nothing has started."""

    model_config = ConfigDict(frozen=True)

    p50: float
    p95: float
    p99: float
    longest: float


class Moment(BaseModel):
    """A stretch of the time line. The delays are those of the tasks that started in it, None when none did."""

    model_config = ConfigDict(frozen=True)

    at_seconds: float
    due_per_second: float
    waiting: int
    replicas: int
    ready: int
    delays: Delays | None


class Outcome(BaseModel):
    """One simulated run.

    Attributes:
        waiting: Tasks that had not started at the end; their delays are in no figure but `oldest_waiting_seconds`.
        handed_back: Runs interrupted by the end of a pod's soft shutdown. They run again.
        killed: Runs interrupted by SIGKILL. They run again, and the start has cost an attempt.
        busy_share: Of all slots of all pods, over all of their life.
        wasted_pod_seconds: Pods starting, idle or stopping, and runs that were interrupted.
    """

    model_config = ConfigDict(frozen=True)

    scenario: str
    seconds: int
    due: int
    started: int
    waiting: int
    oldest_waiting_seconds: float
    delays: Delays
    fewest_replicas: int
    most_replicas: int
    pod_seconds: float
    busy_share: float
    wasted_pod_seconds: float
    handed_back: int
    killed: int
    timeline: tuple[Moment, ...]


@dataclass(frozen=True, slots=True)
class Point:
    waiting: int
    replicas: int
    ready: int


@dataclass(slots=True)
class Recorder:
    """Notes what happens, in `BINS` stretches of equal length."""

    seconds: int
    _width: float = 1.0
    _due: list[int] = field(default_factory=list)
    _delays: list[array[float]] = field(default_factory=list)
    _points: list[Point | None] = field(default_factory=list)
    _fewest: int = 2**31
    _most: int = 0

    def __post_init__(self) -> None:
        bins = min(BINS, self.seconds)
        self._width = self.seconds / bins
        self._due = [0] * bins
        self._delays = [array("d") for _ in range(bins)]
        self._points = [None] * bins

    def due(self, now: float, count: int) -> None:
        self._due[self._bin(now)] += count

    def started(self, at: float, due: float) -> None:
        self._delays[self._bin(at)].append(at - due)

    def state(self, now: float, point: Point) -> None:
        """The last state of a stretch stands for it."""
        self._points[self._bin(now)] = point
        self._fewest = min(self._fewest, point.replicas)
        self._most = max(self._most, point.replicas)

    def outcome(self, scenario: str, fleet: Fleet, *, waiting: list[float]) -> Outcome:
        """Everything that was noted."""
        slot_seconds = fleet.pod_seconds * fleet.spec.slots
        useful = fleet.busy_seconds - fleet.lost_seconds
        every = array("d", (delay for part in self._delays for delay in part))
        return Outcome(
            scenario=scenario,
            seconds=self.seconds,
            due=sum(self._due),
            started=len(every),
            waiting=len(waiting),
            oldest_waiting_seconds=round(self.seconds - min(waiting), 3) if waiting else 0.0,
            delays=_delays(every) or Delays(p50=0.0, p95=0.0, p99=0.0, longest=0.0),
            fewest_replicas=self._fewest,
            most_replicas=self._most,
            pod_seconds=round(fleet.pod_seconds, 1),
            busy_share=round(fleet.busy_seconds / slot_seconds, 4) if slot_seconds else 0.0,
            wasted_pod_seconds=round(fleet.pod_seconds - useful / fleet.spec.slots, 1),
            handed_back=fleet.handed_back,
            killed=fleet.killed,
            timeline=tuple(self._moment(number) for number in range(len(self._due))),
        )

    def _bin(self, at: float) -> int:
        return min(int(at / self._width), len(self._due) - 1)

    def _moment(self, number: int) -> Moment:
        point = self._points[number] or Point(0, 0, 0)
        return Moment(
            at_seconds=round(number * self._width, 3),
            due_per_second=round(self._due[number] / self._width, 3),
            waiting=point.waiting,
            replicas=point.replicas,
            ready=point.ready,
            delays=_delays(self._delays[number]),
        )


def _delays(values: array[float]) -> Delays | None:
    if not values:
        return None
    ordered = sorted(values)

    def at(percentile: float) -> float:
        return round(ordered[min(int(len(ordered) * percentile / 100), len(ordered) - 1)], 3)

    p50, p95, p99 = (at(percentile) for percentile in PERCENTILES)
    return Delays(p50=p50, p95=p95, p99=p99, longest=round(ordered[-1], 3))
