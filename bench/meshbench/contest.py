"""A contest: its contestants do the same in turns, A B C A B C, so that whatever else the machine does meets all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meshbench.figures import Figures, spreads

Turn = Callable[[], Figures]
"""What a contestant does when it is its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a table.

    Attributes:
        figure: Its name among the figures of a turn.
        title: Above the column, with the unit.
        digits: Behind the decimal point.
    """

    figure: str
    title: str
    digits: int = 0


RATE = Column(figure="rate", title="per second")
CPU = Column(figure="cpu", title="CPU s per 1,000", digits=2)


def milliseconds(figure: str, title: str, digits: int = 1) -> Column:
    return Column(figure=figure, title=f"{title} ms", digits=digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a case has come to.

    Attributes:
        case: Its short name, for `--only` and for files.
        title: A line for people.
        columns: What its table shows; the first is what is compared.
        turns: By contestant, in the order in which they were.
        ours: The contestant that the others are compared with; empty where there is nothing to compare.
        note: What a reader has to know to judge the figures.
    """

    case: str
    title: str
    columns: Sequence[Column]
    turns: Mapping[str, Sequence[Figures]]
    ours: str = ""
    note: str = ""


def take_turns(contestants: Mapping[str, Turn], rounds: int) -> dict[str, list[Figures]]:
    """Have everybody do it once in each round, and say what came of it."""
    done: dict[str, list[Figures]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, turn in contestants.items():
            done[name].append(turn())
            print(f"  round {number}  {name:<62} {_brief(done[name][-1])}", flush=True)
    return done


def _brief(figures: Figures) -> str:
    shown = {name: figures[name] for name in ("rate", "p50", "p99", "cpu") if name in figures}
    return "  ".join(f"{name} {value:,.2f}" if value < 100 else f"{name} {value:,.0f}" for name, value in shown.items())


def medians(measured: Measured) -> dict[str, dict[str, float]]:
    """By contestant, the median of each figure."""
    return {
        name: {figure: spread.median for figure, spread in spreads(turns).items()}
        for name, turns in measured.turns.items()
    }
