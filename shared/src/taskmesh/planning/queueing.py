"""How long tasks wait for a free slot: exact for M/M/c, the usual approximation for every other spread of run times.

Arrivals are independent of each other (Poisson), tasks are taken in order, and slots are equal. For run times that are
not exponential the mean wait is Allen and Cunneen's: that of M/M/c times (1 + cv²) / 2, which is exact for one slot
(Pollaczek and Khinchine). The tail of the wait is taken to be exponential, which holds for run times without a heavy
tail: believe it up to a cv of about 2, and simulate beyond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def erlang_b(slots: int, load: float) -> float:
    """The share of arrivals that would find all slots busy if nobody waited."""
    blocked = 1.0
    for count in range(1, slots + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked


def erlang_c(slots: int, load: float) -> float:
    """The share of arrivals that have to wait; 1 from the load on that the slots cannot carry."""
    if load >= slots:
        return 1.0
    blocked = erlang_b(slots, load)
    return blocked / (1 - load / slots * (1 - blocked))


@dataclass(frozen=True, slots=True)
class Station:
    """Slots that take tasks from one queue.

    Attributes:
        rate: Tasks that arrive, per second.
        run_seconds: What a task holds a slot for, on average.
        cv: The standard deviation of that, divided by it: 0 for always the same, 1 for exponential.
        slots: Tasks that run at a time.
    """

    rate: float
    run_seconds: float
    cv: float
    slots: int

    @property
    def load(self) -> float:
        """Slots that are busy on average, if there are enough (erlang)."""
        return self.rate * self.run_seconds

    @property
    def utilisation(self) -> float:
        """1 and more: the queue grows without end."""
        return self.load / self.slots

    @property
    def waiting_share(self) -> float:
        """The share of tasks that wait at all."""
        return erlang_c(self.slots, self.load)

    @property
    def mean_wait(self) -> float:
        """Seconds from due to started, over all tasks; infinite when the queue grows without end."""
        if self.utilisation >= 1:
            return math.inf
        exponential = self.waiting_share * self.run_seconds / (self.slots - self.load)
        return exponential * (1 + self.cv**2) / 2

    @property
    def mean_waiting(self) -> float:
        """Tasks in the queue, on average (Little's law)."""
        return self.rate * self.mean_wait if self.rate else 0.0

    def wait(self, percentile: float) -> float:
        """Seconds within which this percentage of tasks has started; 0 when no more than the others wait."""
        if self.utilisation >= 1:
            return math.inf
        share, beyond = self.waiting_share, 1 - percentile / 100
        if share <= beyond or not self.mean_wait:
            return 0.0
        return self.mean_wait / share * math.log(share / beyond)


def slots_for(rate: float, run_seconds: float, cv: float, *, wait: float, percentile: float) -> int:
    """The fewest slots with which this percentage of tasks starts within `wait` seconds."""

    def enough(slots: int) -> bool:
        return Station(rate, run_seconds, cv, slots).wait(percentile) <= wait

    few = math.floor(rate * run_seconds)  # never enough
    many = max(few + 1, 1)
    step = 1
    while not enough(many):
        few, many, step = many, many + step, step * 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
