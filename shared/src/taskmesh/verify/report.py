"""What a verification found: one verdict for each type and way of delivery."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, computed_field

from taskmesh.contracts.lifecycle import TaskKind


class Way(StrEnum):
    """How a task comes to be delivered a second time."""

    AGAIN = "again"
    """After the commit: its acknowledgement was lost."""
    KILLED = "killed"
    """Its process died right before the last commit."""
    AT_ONCE = "at_once"
    """The connection was lost in mid-task: two copies run at the same time."""


class Verdict(StrEnum):
    OK = "ok"
    DIFFERS = "differs"
    NOT_EXERCISED = "not_exercised"


class Finding(BaseModel):
    """What a way of delivery did to the effects of a type."""

    model_config = ConfigDict(frozen=True)

    way: Way
    verdict: Verdict
    details: tuple[str, ...] = ()
    """What differs, or why it could not be found out."""


class TypeReport(BaseModel):
    """The findings about one type."""

    model_config = ConfigDict(frozen=True)

    type: str
    kind: TaskKind
    payload: str
    """Where the payload came from: `given`, `schema`, or `sent by <type>`."""
    effects: tuple[str, ...] = ()
    """What one delivery did, in counts."""
    not_compared: tuple[str, ...] = ()
    """Columns that vary from one clean delivery to the next, and whatever was to be ignored."""
    findings: tuple[Finding, ...]

    def finding(self, way: Way) -> Finding:
        """What was found for a way."""
        return next(finding for finding in self.findings if finding.way is way)

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated properties
    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        found = {finding.verdict for finding in self.findings}
        return next((verdict for verdict in (Verdict.DIFFERS, Verdict.NOT_EXERCISED) if verdict in found), Verdict.OK)


class Report(BaseModel):
    """All types of a service."""

    model_config = ConfigDict(frozen=True)

    service: str
    release: str
    types: tuple[TypeReport, ...]
    skipped: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if every type is idempotent, 1 if one is not, 2 if one could not be exercised, or there was none."""
        verdicts = {each.verdict for each in self.types}
        if Verdict.DIFFERS in verdicts:
            return 1
        return 0 if verdicts == {Verdict.OK} else 2


def not_exercised(reason: str) -> tuple[Finding, ...]:
    """The findings about a type of which nothing could be found out."""
    return tuple(Finding(way=way, verdict=Verdict.NOT_EXERCISED, details=(reason,)) for way in Way)
