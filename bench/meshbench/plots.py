"""Pictures of the results: one SVG for each case, bars of medians with the range over the rounds."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from meshbench.contest import Column, Measured
from meshbench.figures import spreads

OURS_COLOUR = "#0969da"
OTHERS_COLOUR = "#8c959f"
PANELS = 3
"""The first columns of a case's table, which are those that it is about."""

# The same figures make the same file, so that a new run changes only the pictures of what has changed.
mpl.rcParams.update({"svg.hashsalt": "taskmesh", "svg.fonttype": "none", "font.size": 9})


def draw(measured: Measured, path: Path) -> None:
    """Write the picture of a case."""
    columns = measured.columns[:PANELS]
    names = list(measured.turns)
    figure = Figure(figsize=(11, 1.1 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        _bars(panel, measured, column)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(measured.title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, metadata={"Date": None})


def _bars(panel: mpl.axes.Axes, measured: Measured, column: Column) -> None:
    for place, (name, turns) in enumerate(measured.turns.items()):
        spread = spreads(turns).get(column.figure)
        if spread is None:
            continue
        ours = name.startswith(measured.ours) if measured.ours else True
        panel.barh(place, spread.median, color=OURS_COLOUR if ours else OTHERS_COLOUR, height=0.7)
        panel.plot([spread.least, spread.most], [place, place], color="black", linewidth=1)
        panel.text(spread.most, place, f" {spread.median:,.{column.digits}f}", va="center", fontsize=8)
    panel.set_title(column.title, fontsize=9)
    panel.margins(x=0.22)
    panel.set_xlim(left=0)
    panel.spines[["top", "right"]].set_visible(False)
