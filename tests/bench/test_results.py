"""What the benchmark writes."""

from __future__ import annotations

from meshbench.contest import RATE, Measured
from meshbench.report import rows
from meshbench.results import BEGIN, END, Result, publish

MEASURED = Measured(
    case="submit",
    title="Submit",
    columns=[RATE],
    turns={"Taskmesh": [{"rate": 1000.0}, {"rate": 3000.0}], "echo": [{"rate": 4000.0}, {"rate": 4000.0}]},
    ours="Taskmesh",
)
ABOUT = {
    "at": "2026-01-01T00:00:00+00:00",
    "commit": "0123456789ab",
    "changed": False,
    "rounds": 2,
    "machine": {"processor": "abacus", "cores": 2, "memory_mib": 2048, "system": "Linux", "load_before": 0.1},
    "versions": {"python": "3.11"},
}


def test_a_table_has_medians_ranges_and_ratios():
    assert rows(MEASURED)[1:] == [
        ["Taskmesh", "2,000 (1,000 to 3,000)", "1"],
        ["echo", "4,000", "0.50 (0.25 to 0.75)"],
    ]


def test_what_people_have_written_on_the_page_stays(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold figures\n{END}\n\n## Tried\n\nMuch.\n")

    publish([Result(MEASURED, ABOUT)], page)

    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("## Tried\n\nMuch.\n")
    assert "old figures" not in text
    assert "| echo | 4,000 | 0.50 (0.25 to 0.75) |" in text
