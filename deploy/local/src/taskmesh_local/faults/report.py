"""What a campaign found, as a table for a person and as JSON for a machine."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taskmesh.management import Management
from taskmesh_local.faults.evidence import Evidence
from taskmesh_local.faults.injectors import Injectors
from taskmesh_local.faults.invariants import Finding
from taskmesh_local.faults.options import Options
from taskmesh_local.faults.schedule import tally
from taskmesh_local.faults.supervisor import Supervisor

LOG_WIDTH = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One campaign, in figures.

    Attributes:
        replay: The command that runs it again.
        quiet: Whether the healed mesh finished its work in time.
        faults: How many were injected of each kind.
        tasks: How many the ledger holds, by type and by their last state.
    """

    seed: int
    minutes: float
    rate: float
    plant: str | None
    replay: str
    quiet: bool
    faults: dict[str, int]
    not_injected: list[str]
    tasks: dict[str, dict[str, int]]
    requests: int
    restarts: dict[str, int]
    ended_by_themselves: dict[str, int]
    findings: Sequence[Finding]
    journal: list[str]
    versions: dict[str, str]
    commit: str | None

    @classmethod
    def of(
        cls,
        options: Options,
        evidence: Evidence,
        findings: Sequence[Finding],
        injectors: Injectors,
        supervisor: Supervisor,
        *,
        quiet: bool,
    ) -> Self:
        """The report of a campaign that is over; its servers still run."""
        tasks: dict[str, Counter[str]] = {}
        for task in evidence.tasks.values():
            tasks.setdefault(task.type, Counter())[task.state] += 1
        return cls(
            seed=options.seed,
            minutes=options.minutes,
            rate=options.rate,
            plant=options.plant,
            replay=options.replay(),
            quiet=quiet,
            faults=tally(injection.fault for injection in injectors.done if injection.injected),
            not_injected=[f"{each.fault}: {each.effect}" for each in injectors.done if not each.injected],
            tasks={name: dict(sorted(states.items())) for name, states in sorted(tasks.items())},
            requests=evidence.books.requests,
            restarts=dict(sorted(supervisor.restarts.items())),
            ended_by_themselves=dict(sorted(supervisor.unexpected.items())),
            findings=findings,
            journal=injectors.journal.lines,
            versions=_versions(evidence, injectors),
            commit=_commit(),
        )

    @property
    def holds(self) -> bool:
        """Whether every invariant holds."""
        return self.quiet and all(finding.holds for finding in self.findings)

    @property
    def broken(self) -> list[str]:
        """The names of the invariants that do not hold."""
        return [finding.name for finding in self.findings if not finding.holds]

    @property
    def fault_count(self) -> int:
        return sum(self.faults.values())

    @property
    def task_count(self) -> int:
        return sum(sum(states.values()) for states in self.tasks.values())

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = asdict(self)
        record["holds"] = self.holds
        record["findings"] = [asdict(finding) | {"holds": finding.holds} for finding in self.findings]
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """Print the faults, the invariants, and how to see it again when one does not hold."""
        if not console.is_terminal:
            # A log of CI has no width; the default of 80 columns would fold every figure.
            console = Console(file=console.file, width=LOG_WIDTH)
        console.print()
        console.print(
            f"seed {self.seed}, {self.minutes:g} minutes: {self.fault_count} faults,"
            f" {self.task_count} tasks, {self.requests} requests, {sum(self.restarts.values())} restarts",
            highlight=False,
        )
        console.print(", ".join(f"{count} {kind}" for kind, count in self.faults.items()), highlight=False)
        for line in self.not_injected:
            console.print(line, highlight=False, markup=False)
        table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0))
        for title in ("invariant", "figure", "verdict"):
            table.add_column(title, overflow="fold")
        for finding in self.findings:
            verdict = "[green]holds[/green]" if finding.holds else "[red]BROKEN[/red]"
            table.add_row(escape(finding.name), escape(finding.figure), verdict)
        console.print(table)
        for finding in self.findings:
            for fault in finding.faults:
                console.print(f"{finding.name}: {fault}", highlight=False, markup=False, soft_wrap=True)
            for note in finding.notes:
                console.print(note, highlight=False, markup=False, soft_wrap=True)
        if not self.quiet:
            console.print("The mesh did not finish its work after everything was healed.", highlight=False)
        if not self.holds:
            console.print(f"\nTo see it again:\n  {self.replay}\n", highlight=False, markup=False, soft_wrap=True)


def _versions(evidence: Evidence, injectors: Injectors) -> dict[str, str]:
    with Management(injectors.broker.management_url) as management:
        rabbitmq = str(management.overview()["rabbitmq_version"])
    return {
        "python": platform.python_version(),
        "rabbitmq": rabbitmq,
        "postgresql": evidence.databases.rows("gateway", "select current_setting('server_version')")[0][0],
        "celery": version("celery"),
        "taskmesh": version("taskmesh"),
    }


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
