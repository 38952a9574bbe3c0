"""What a run leaves behind: JSON with every turn, a picture for each case, and the tables of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshbench import report
from meshbench.contest import Column, Measured, medians

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
"""Kept with the code: the pictures are in docs/performance.md."""
QUICK_FOLDER = FOLDER / "quick"
"""Kept by nobody."""
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- written by `make bench` from here -->"
END = "<!-- to here -->"


@dataclass(frozen=True, slots=True)
class Result:
    """A case with what a reader has to know of the run that it was measured in."""

    measured: Measured
    about: Mapping[str, Any]


def write(results: Sequence[Result], folder: Path) -> None:
    """Replace the files of these cases; those of others stay."""
    from meshbench import plots

    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        measured = result.measured
        record = {"about": result.about, "medians": medians(measured), **asdict(measured)}
        (folder / f"{measured.case}.json").write_text(json.dumps(record, indent=1) + "\n")
        plots.draw(measured, folder / f"{measured.case}.svg")


def read(folder: Path) -> list[Result]:
    """All that is there, in the order in which cases run."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    records.sort(key=lambda record: record["about"]["place"])
    return [Result(_measured(record), record["about"]) for record in records]


def publish(results: Sequence[Result], page: Path = PAGE) -> None:
    """Replace the tables of the page by these, with links to the pictures; the rest of it stays."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    tables = [
        f"{report.markdown(each.measured)}\n{_run(each.about)}\n\n"
        f"![{each.measured.title}](../bench/results/{each.measured.case}.svg)\n"
        for each in results
    ]
    newest = max((each.about for each in results), key=lambda about: str(about["at"]))
    page.write_text("\n".join([f"{before}{BEGIN}", "", _machine(newest), *tables, f"{END}{after}"]))


def _measured(record: Mapping[str, Any]) -> Measured:
    columns = [Column(**column) for column in record["columns"]]
    return Measured(**{name: record[name] for name in ("case", "title", "turns", "ours", "note")}, columns=columns)


def _machine(about: Mapping[str, Any]) -> str:
    machine = about["machine"]
    told = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), {machine['memory_mib'] / 1024:.0f} GiB,"
        f" {machine['system']}, which the load generator shares with everything that is measured.\n\n"
        f"Versions: {told}.\n"
    )


def _run(about: Mapping[str, Any]) -> str:
    uncommitted = " with changes" if about["changed"] else ""
    return (
        f"{about['at']}, commit `{about['commit']}`{uncommitted}, {about['rounds']} rounds;"
        f" load average before the run {about['machine']['load_before']}."
    )
