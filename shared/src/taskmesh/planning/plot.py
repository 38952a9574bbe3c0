"""A simulated run as a picture: four panels over one axis of time, in light and dark.

Drawn by hand, because a plotting library would be the largest dependency of the command, for one kind of picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from taskmesh.planning.load import Load, Window
from taskmesh.planning.outcome import Moment, Outcome

WIDTH = 760
LEFT = 64
RIGHT = 16
HEIGHT = 84
GAP = 34
TOP = 46
STYLE = """
svg { font: 11px system-ui, sans-serif; background: #fff }
text { fill: #57606a } .title, .name { font-weight: 600; fill: #1f2328 } .title { font-size: 14px }
.grid { stroke: #d8dee4; stroke-width: 1 } .band { fill: #cf222e; opacity: .1 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round } polygon { opacity: .16 }
.blue { stroke: #0969da } .blue-fill { fill: #0969da } .green { stroke: #1a7f37 } .green-fill { fill: #1a7f37 }
.amber { stroke: #bf8700 } .amber-fill { fill: #bf8700 } .red { stroke: #cf222e } .red-fill { fill: #cf222e }
.target { stroke: #57606a; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 } text { fill: #9198a1 } .title, .name { fill: #f0f6fc } .grid { stroke: #30363d }
.blue { stroke: #4493f8 } .blue-fill { fill: #4493f8 } .green { stroke: #3fb950 } .green-fill { fill: #3fb950 }
.amber { stroke: #d29922 } .amber-fill { fill: #d29922 } .red { stroke: #f85149 } .red-fill { fill: #f85149 }
.band { fill: #f85149; opacity: .18 } .target { stroke: #9198a1 } }
""".strip()


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    colour: str
    value: Callable[[Moment], float | None]
    filled: bool = False
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    name: str
    lines: tuple[Line, ...]
    target: float | None = None


def draw(outcome: Outcome, load: Load, *, delay_seconds: float, subtitle: str) -> str:
    """The picture as SVG, ready to be written to a file."""
    panels = (
        Panel("due, tasks/s", (Line("", "blue", lambda at: at.due_per_second, filled=True),)),
        Panel("waiting, tasks", (Line("", "amber", lambda at: at.waiting, filled=True),)),
        Panel(
            "pods",
            (
                Line("asked for", "green", lambda at: at.replicas, steps=True),
                Line("ready", "green", lambda at: at.ready, filled=True, steps=True),
            ),
        ),
        Panel(
            "delay of those that start, s",
            (
                Line("p99", "red", lambda at: at.delays.p99 if at.delays else None),
                Line("p95", "amber", lambda at: at.delays.p95 if at.delays else None),
                Line("p50", "blue", lambda at: at.delays.p50 if at.delays else None),
            ),
            target=delay_seconds,
        ),
    )
    height = TOP + len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(outcome.scenario)}: {escape(subtitle)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="20">{escape(outcome.scenario)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="20" text-anchor="end">{escape(subtitle)}</text>',
    ]
    for window, says in _bands(load):
        parts.append(f'<text x="{_x(window.start, outcome.seconds) + 4:.1f}" y="{TOP + 13}">{escape(says)}</text>')
    for number, panel in enumerate(panels):
        parts += _panel(panel, outcome, TOP + number * (HEIGHT + GAP), [window for window, _ in _bands(load)])
    parts += [*_hours(outcome.seconds, height - GAP), "</svg>\n"]
    return "\n".join(parts)


def _panel(panel: Panel, outcome: Outcome, top: float, bands: Sequence[Window]) -> list[str]:
    values = [value for line in panel.lines for at in outcome.timeline if (value := line.value(at)) is not None]
    highest = nice(max([*values, panel.target or 0.0, 1e-3]))
    seconds = outcome.seconds

    def y(value: float) -> float:
        return top + HEIGHT * (1 - value / highest)

    parts = [
        f'<rect class="band" x="{_x(band.start, seconds):.1f}" y="{top}" '
        f'width="{_x(band.end, seconds) - _x(band.start, seconds):.1f}" height="{HEIGHT}"/>'
        for band in bands
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share * highest)}" y2="{y(share * highest)}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(share * highest) + 4}" text-anchor="end">{_number(share * highest)}</text>'
        )
    parts.append(f'<text class="name" x="{LEFT}" y="{top - 7}">{escape(panel.name)}</text>')
    at = LEFT + 20 + 6.2 * len(panel.name)
    for line in panel.lines:
        parts += _line(line, outcome, y)
        if line.name:
            parts.append(f'<text class="{line.colour}-fill" x="{at:.0f}" y="{top - 7}">{line.name}</text>')
            at += 12 + 6.2 * len(line.name)
    if panel.target is not None and panel.target > highest / 50:
        level = y(panel.target)
        parts.append(f'<line class="target" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
    return parts


def _line(line: Line, outcome: Outcome, y: Callable[[float], float]) -> list[str]:
    parts = []
    for run in _runs(outcome, line):
        points = [f"{_x(at, outcome.seconds):.1f},{y(value):.1f}" for at, value in run]
        if not line.filled or not line.steps:
            parts.append(f'<polyline class="{line.colour}" points="{" ".join(points)}"/>')
        if line.filled:
            first, last = (f"{_x(run[end][0], outcome.seconds):.1f},{y(0):.1f}" for end in (0, -1))
            parts.append(f'<polygon class="{line.colour}-fill" points="{first} {" ".join(points)} {last}"/>')
    return parts


def _runs(outcome: Outcome, line: Line) -> list[list[tuple[float, float]]]:
    """The stretches of a line that have values; a step holds until the next one."""
    runs: list[list[tuple[float, float]]] = [[]]
    width = outcome.seconds / len(outcome.timeline)
    for moment in outcome.timeline:
        value = line.value(moment)
        if value is None:
            runs.append([])
        elif line.steps:
            runs[-1] += [(moment.at_seconds, value), (moment.at_seconds + width, value)]
        else:
            runs[-1].append((moment.at_seconds + width / 2, value))
    return [run for run in runs if run]


def _hours(seconds: int, bottom: float) -> list[str]:
    unit, name = (3600, "h") if seconds >= 4 * 3600 else (60, "min")
    step = nice(seconds / unit / 6)
    marks = [number * step for number in range(int(seconds / unit / step + 1e-9) + 1)]
    return [
        f'<text x="{_x(mark * unit, seconds):.1f}" y="{bottom + 16}" text-anchor="middle">{mark:g} {name}</text>'
        for mark in marks
    ]


def _bands(load: Load) -> list[tuple[Window, str]]:
    """What happens to the mesh, and when."""
    bands = ((load.outage, "broker away"), (load.slow, f"runs take {load.slowness:g} times as long"))
    return [(window, says) for window, says in bands if math.isfinite(window.start)]


def _x(at: float, seconds: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(at / seconds, 1.0)


def nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _number(value: float) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
