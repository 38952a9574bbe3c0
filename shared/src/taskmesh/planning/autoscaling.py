"""The rules by which the HorizontalPodAutoscaler and KEDA decide, as they document them.

The HPA is that of autoscaling/v2 in Kubernetes 1.32 to 1.36 with its default flags; KEDA is 2.20.

- https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
- https://keda.sh/docs/2.20/concepts/scaling-deployments/
- https://keda.sh/docs/2.20/reference/scaledobject-spec/

Time is a number of seconds from any zero; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

SYNC_SECONDS = 15.0
"""`--horizontal-pod-autoscaler-sync-period`."""
TOLERANCE = 0.1
"""`--horizontal-pod-autoscaler-tolerance`."""


class Select(StrEnum):
    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


@dataclass(frozen=True, slots=True)
class Policy:
    """How much may change within a period: so many pods, or such a percentage of those at its beginning."""

    pods: int | None = None
    percent: int | None = None
    period_seconds: float = 15.0

    def grown(self, replicas: int) -> int:
        if self.pods is not None:
            return replicas + self.pods
        # Rounded up, or few replicas would never become more.
        return math.ceil(replicas * (100 + (self.percent or 0)) / 100)

    def shrunk(self, replicas: int) -> int:
        if self.pods is not None:
            return replicas - self.pods
        return int(replicas * (100 - (self.percent or 0)) / 100)


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction of an HPA's `behavior`."""

    stabilization_seconds: float = 0.0
    policies: tuple[Policy, ...] = ()
    select: Select = Select.MAX


SCALE_UP = Rules(policies=(Policy(pods=4), Policy(percent=100)))
"""The default: doubled or four more within 15 s, at once."""
SCALE_DOWN = Rules(stabilization_seconds=300.0, policies=(Policy(percent=100),))
"""The default: to anything, once nothing has asked for more in five minutes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a metric says: its value in total, the target for each pod, and None in place of a value that failed."""

    value: float | None
    target: float


def desired_by_average(reading: Reading, replicas: int) -> int | None:
    """What one metric of type AverageValue asks for, given the replicas that there are."""
    if reading.value is None:
        return None
    if replicas and abs(1 - reading.value / (reading.target * replicas)) <= TOLERANCE:
        return replicas
    # What binary floating point makes of an exact quotient must not become one more pod.
    return math.ceil(reading.value / reading.target - 1e-9)


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods as a resource metric sees them; `unready` are starting, `missing` have no figure.

    Attributes:
        utilisations: Of each ready pod, as a share of what it requests.
    """

    utilisations: tuple[float, ...]
    unready: int = 0
    missing: int = 0


def desired_by_utilisation(pods: Pods, target: float, replicas: int) -> int | None:
    """What a resource metric of type Utilization asks for.

    Pods that start count as idle when the others ask for more, and not at all when they ask for fewer. Pods without a
    figure count as idle in the first case and as at their request in the second.
    """
    if not pods.utilisations:
        return None
    ratio = sum(pods.utilisations) / len(pods.utilisations) / target
    unready = pods.unready if ratio > 1 else 0
    if not unready and not pods.missing:
        return replicas if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * len(pods.utilisations) - 1e-9)
    counted = len(pods.utilisations) + unready + pods.missing
    assumed = pods.missing * (1.0 if ratio < 1 else 0.0)
    corrected = (sum(pods.utilisations) + assumed) / counted / target
    if abs(1 - corrected) <= TOLERANCE or (ratio < 1) != (corrected < 1):
        return replicas
    wanted = math.ceil(corrected * counted - 1e-9)
    return replicas if (corrected < 1 and wanted > replicas) or (corrected > 1 and wanted < replicas) else wanted


@dataclass(slots=True)
class HorizontalPodAutoscaler:
    """Between `minimum` and `maximum` replicas; KEDA makes one for each ScaledObject."""

    minimum: int
    maximum: int
    scale_up: Rules = SCALE_UP
    scale_down: Rules = SCALE_DOWN
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _added: list[tuple[float, int]] = field(default_factory=list)
    _removed: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, replicas: int, wishes: Sequence[int | None]) -> int:
        """The replicas that there shall be from now on; `wishes` has one entry for each metric, None for a failed one.

        The largest wish counts. While a metric fails there is no way down, and with none left there is no change. At 0
        replicas the autoscaler is switched off.
        """
        if replicas == 0:
            return 0
        if not self.minimum <= replicas <= self.maximum:
            return self._change(now, replicas, min(max(replicas, self.minimum), self.maximum))
        if not self._recommended:
            self._recommended.append((now, replicas))
        known = [wish for wish in wishes if wish is not None]
        if not known or (len(known) < len(wishes) and max(known) < replicas):
            return replicas
        return self._change(now, replicas, self._limited(now, replicas, self._stabilized(now, replicas, max(known))))

    def _stabilized(self, now: float, replicas: int, wish: int) -> int:
        """Up to the least, and down to the most, that was wished for within the window of that direction."""
        up_since = now - self.scale_up.stabilization_seconds
        down_since = now - self.scale_down.stabilization_seconds
        least = min([wish, *(past for at, past in self._recommended if at > up_since)])
        most = max([wish, *(past for at, past in self._recommended if at > down_since)])
        oldest = min(up_since, down_since)
        self._recommended = [*((at, past) for at, past in self._recommended if at >= oldest), (now, wish)]
        return min(max(replicas, least), most)

    def _limited(self, now: float, replicas: int, wish: int) -> int:
        if wish > replicas:
            return min(wish, self.maximum, max(self._limit(now, replicas, self.scale_up, up=True), replicas))
        if wish < replicas:
            return max(wish, self.minimum, min(self._limit(now, replicas, self.scale_down, up=False), replicas))
        return wish

    def _limit(self, now: float, replicas: int, rules: Rules, *, up: bool) -> int:
        if rules.select is Select.DISABLED:
            return replicas
        bounds = []
        for policy in rules.policies:
            since = now - policy.period_seconds
            added = sum(count for at, count in self._added if at > since)
            removed = sum(count for at, count in self._removed if at > since)
            at_start = replicas - added + removed
            bounds.append(policy.grown(at_start) if up else policy.shrunk(at_start))
        furthest = max if up == (rules.select is Select.MAX) else min
        return furthest(bounds)

    def _change(self, now: float, replicas: int, wish: int) -> int:
        if wish != replicas:
            changes = self._added if wish > replicas else self._removed
            changes.append((now, abs(wish - replicas)))
            longest = max(policy.period_seconds for policy in (*self.scale_up.policies, *self.scale_down.policies))
            changes[:] = [(at, count) for at, count in changes if at > now - longest]
        return wish


class Behavior(StrEnum):
    """What KEDA falls back to."""

    STATIC = "static"
    CURRENT_REPLICAS_IF_HIGHER = "currentReplicasIfHigher"


@dataclass(frozen=True, slots=True)
class Fallback:
    """For a trigger that has failed more than `failure_threshold` times in a row."""

    failure_threshold: int = 3
    replicas: int = 1
    behavior: Behavior = Behavior.CURRENT_REPLICAS_IF_HIGHER

    def wanted(self, replicas: int) -> int:
        """What the trigger asks for in place of its value."""
        return self.replicas if self.behavior is Behavior.STATIC else max(self.replicas, replicas)


@dataclass(frozen=True, slots=True)
class ScaledObject:
    """The part of a ScaledObject that decides; each trigger's metric has the type AverageValue."""

    minimum: int = 0
    maximum: int = 100
    polling_seconds: float = 30.0
    cooldown_seconds: float = 300.0
    activation: float = 0.0
    """A trigger is active above this value."""
    fallback: Fallback | None = None
    scale_up: Rules = SCALE_UP
    scale_down: Rules = SCALE_DOWN


class Keda:
    """KEDA for one ScaledObject: between 0 and 1 itself, from 1 upwards through its HPA."""

    def __init__(self, spec: ScaledObject, triggers: int) -> None:
        self._spec = spec
        self._failures = [0] * triggers
        self._active_at: float | None = None
        # An HPA has at least one replica; the last step down is KEDA's.
        self._hpa = HorizontalPodAutoscaler(max(spec.minimum, 1), spec.maximum, spec.scale_up, spec.scale_down)

    @property
    def falls_back(self) -> bool:
        """What the condition `Fallback` of the ScaledObject says."""
        fallback = self._spec.fallback
        return fallback is not None and any(count > fallback.failure_threshold for count in self._failures)

    def poll(self, now: float, replicas: int, readings: Sequence[Reading]) -> int:
        """What KEDA's own loop does, every `polling_seconds`: it wakes and puts to sleep, and leaves the rest alone."""
        values = [reading.value for reading in readings]
        if any(value is not None and value > self._spec.activation for value in values):
            if None not in values or replicas == 0:
                self._active_at = now
            return replicas or max(self._spec.minimum, 1)
        if None in values:
            return replicas
        if self._spec.minimum:
            return max(replicas, self._spec.minimum)
        cooled = self._active_at is None or now - self._active_at > self._spec.cooldown_seconds
        return 0 if cooled else replicas

    def sync(self, now: float, replicas: int, readings: Sequence[Reading]) -> int:
        """What the HPA does, every `SYNC_SECONDS`, with what KEDA tells it of each trigger."""
        if replicas == 0:
            return 0
        wishes = [self._wish(number, reading, replicas) for number, reading in enumerate(readings)]
        return self._hpa.sync(now, replicas, wishes)

    def _wish(self, number: int, reading: Reading, replicas: int) -> int | None:
        if reading.value is not None:
            self._failures[number] = 0
            return desired_by_average(reading, replicas)
        self._failures[number] += 1
        fallback = self._spec.fallback
        if fallback is None or self._failures[number] <= fallback.failure_threshold:
            return None
        return desired_by_average(Reading(reading.target * fallback.wanted(replicas), reading.target), replicas)
