"""What a simulated service has to do: when tasks become due, how long they run, and what breaks meanwhile."""

from __future__ import annotations

import bisect
import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

from taskmesh.errors import TaskmeshError

COLUMNS = ("at_seconds", "tasks")
SHORTEST = 60.0
LONGEST = 31 * 86_400.0
RUN_TIMES = 16_384
LEAST_CV = 0.01


class BadRecording(TaskmeshError):
    """A file of recorded load cannot be used."""


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to before `end`, in seconds since the load began."""

    start: float
    end: float

    def __contains__(self, at: float) -> bool:
        return self.start <= at < self.end


NEVER = Window(math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one service.

    Attributes:
        seconds: How long it lasts.
        rate: Tasks that become due per second, at a moment.
        run_seconds: What one run of a task takes on average.
        cv: The spread of that: standard deviation by mean.
        known_ahead: Tasks that the outbox knows before they are due: moment and count.
        outage: While the broker is away.
        slow: While runs take `slowness` times as long, and `failing` of them end in a retry.
        retry_seconds: From the end of such a run to the moment at which the next one is due.
    """

    name: str
    seconds: float
    rate: Callable[[float], float]
    run_seconds: float
    cv: float = 1.0
    known_ahead: tuple[tuple[float, int], ...] = ()
    outage: Window = NEVER
    slow: Window = NEVER
    slowness: float = 1.0
    failing: float = 0.0
    retry_seconds: float = 60.0

    def expected_tasks(self) -> float:
        """How many tasks become due, retries left out."""
        return sum(self.rate(second + 0.5) for second in range(int(self.seconds))) + sum(
            count for _, count in self.known_ahead
        )

    def arrivals(self, random: Random) -> Iterator[list[float]]:
        """The moments at which tasks become due, second by second; independent of each other within a second."""
        for second in range(int(self.seconds)):
            count = poisson(random, self.rate(second + 0.5))
            yield sorted(second + random.random() for _ in range(count))


def poisson(random: Random, mean: float) -> int:
    """A random count with this mean; for large ones by the normal distribution, which then is the same."""
    if mean > 50:
        return max(round(random.normalvariate(mean, math.sqrt(mean))), 0)
    limit, count, product = math.exp(-mean), 0, random.random()
    while product > limit:
        count += 1
        product *= random.random()
    return count


@cache
def spread(cv: float) -> tuple[float, ...]:
    """Run times by a gamma distribution, with a mean of exactly 1: all equal at a cv of 0, exponential at 1.

    They are drawn once, and taken in turn.
    """
    if cv < LEAST_CV:
        return (1.0,)
    random, shape = Random(0), 1 / cv**2  # noqa: S311 - a simulation
    drawn = [random.gammavariate(shape, 1.0) for _ in range(RUN_TIMES)]
    mean = sum(drawn) / len(drawn)
    return tuple(value / mean for value in drawn)


def constant(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def wave(low: float, peak: float, day_seconds: float) -> Callable[[float], float]:
    """A day that begins at its quietest and has its peak in the middle."""
    mean, swing = (peak + low) / 2, (peak - low) / 2
    return lambda at: mean - swing * math.cos(2 * math.pi * at / day_seconds)


def flood(usual: float, count: float, start: float, per_second: float) -> Callable[[float], float]:
    """`count` more than usual, as fast as the gateway takes them."""
    end = start + count / per_second
    return lambda at: usual + (per_second if start <= at < end else 0.0)


def read_recording(path: Path) -> tuple[float, Callable[[float], float]]:
    """How long a recording lasts, and its rate at a moment.

    The file is CSV with the columns `at_seconds` (or any numbers that rise, such as Unix times) and `tasks`: how many
    became due from that moment to the next row's.

    Raises:
        BadRecording: It cannot be read; says what to mend.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecording(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    rows = csv.DictReader(io.StringIO(text))
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        raise BadRecording(f"{path} needs a first line with the columns {' and '.join(COLUMNS)}")
    moments, counts = _numbers(path, list(rows))
    spans = [after - before for before, after in pairwise(moments)]
    if not spans or min(spans) <= 0:
        raise BadRecording(f"{path} needs two rows or more, with at_seconds rising from row to row")
    # Nobody says when the last row ends: it lasts as long as the one before.
    spans.append(spans[-1])
    if not SHORTEST <= sum(spans) <= LONGEST:
        raise BadRecording(f"{path} lasts {sum(spans):g} s; it must be a minute or more, and 31 days or less")
    rates = [count / span for count, span in zip(counts, spans, strict=True)]
    starts = [moment - moments[0] for moment in moments]
    return starts[-1] + spans[-1], lambda at: rates[max(bisect.bisect_right(starts, at) - 1, 0)]


def _numbers(path: Path, rows: Sequence[dict[str, str]]) -> tuple[list[float], list[float]]:
    moments, counts = [], []
    for number, row in enumerate(rows, start=2):
        try:
            moment, count = (float(row[column] or "") for column in COLUMNS)
        except (TypeError, ValueError):
            raise BadRecording(f"{path}, line {number}: {' and '.join(COLUMNS)} must be numbers") from None
        if not math.isfinite(moment) or not 0 <= count < math.inf:
            raise BadRecording(f"{path}, line {number}: tasks must be 0 or more, and both numbers finite")
        moments.append(moment)
        counts.append(count)
    return moments, counts
