"""Results for people: a table for each case, on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from meshbench.contest import Column, Measured
from meshbench.figures import Spread, ratio, spreads


def rows(measured: Measured) -> list[list[str]]:
    """The table of a case with its heading: medians, in brackets the least and the most, and the ratio at the end."""
    compared = measured.columns[0]
    heading = ["", *(column.title for column in measured.columns)]
    if measured.ours:
        heading.append(f"{measured.ours} by this, {compared.title}")
    table = [heading]
    for name, turns in measured.turns.items():
        found = spreads(turns)
        cells = [_cell(found.get(column.figure), column) for column in measured.columns]
        if measured.ours:
            cells.append(_ratio(measured, compared.figure, name))
        table.append([name, *cells])
    return table


def text(measured: Measured) -> str:
    """The table for a terminal."""
    table = rows(measured)
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([measured.title, *lines, *_remarks(measured)])


def markdown(measured: Measured) -> str:
    """The table for a page."""
    heading, *table = rows(measured)
    lines = [_line(heading), _line(["---", *["---:"] * (len(heading) - 1)]), *(_line(row) for row in table)]
    return "\n".join([f"### {measured.title}", "", *lines, "", *(f"{each}\n" for each in _remarks(measured))])


def _remarks(measured: Measured) -> list[str]:
    remarks = [measured.note] if measured.note else []
    others = [turn["elsewhere"] for turns in measured.turns.values() for turn in turns if "elsewhere" in turn]
    if others:
        spread = Spread.of(others)
        remarks.append(
            f"Programs that are not of the benchmark kept {spread.median:.2f} cores busy meanwhile"
            f" ({spread.least:.2f} to {spread.most:.2f} in a turn)."
        )
    return remarks


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(spread: Spread | None, column: Column) -> str:
    if spread is None:
        return "-"
    least, median, most = (f"{value:,.{column.digits}f}" for value in (spread.least, spread.median, spread.most))
    return median if least == most else f"{median} ({least} to {most})"


def _ratio(measured: Measured, figure: str, name: str) -> str:
    if name == measured.ours:
        return "1"
    found = ratio(measured.turns, figure, measured.ours, name)
    return "-" if found is None else f"{found.median:.2f} ({found.least:.2f} to {found.most:.2f})"
