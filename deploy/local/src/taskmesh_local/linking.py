"""How a trace is tied to others: the two ends of a span link, told once and from where one stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from taskmesh_local.overview import Overview
from taskmesh_local.spans import Link

# What a link says in the words of its maker, in those of the other end, and to a person who stands at the maker's.
RELATIONS = (
    ("scheduled_by", "scheduled_as", "Scheduled by"),
    ("scheduled_as", "scheduled_by", "Ran later as"),
    ("replay_of", "replayed_as", "Replay of"),
    ("replayed_as", "replay_of", "Replayed as"),
    ("retry_of", "retried_as", "Retry of"),
    ("retried_as", "retry_of", "Retried as"),
    ("schedule_of", "fired_as", "Fired by the schedule made in"),
    ("fired_as", "schedule_of", "Made the schedule that fired"),
    ("", "linked_from", "Links to"),
    ("linked_from", "", "Linked from"),
)
INVERSE = {relation: inverse for relation, inverse, _ in RELATIONS}
LABELS = {relation: label for relation, _, label in RELATIONS}
# Towards where the trace came from.
BACKWARDS = frozenset({"scheduled_by", "replay_of", "retry_of", "schedule_of", "linked_from"})


@dataclass(frozen=True, slots=True)
class Tie:
    """A trace that this one is tied to.

    Attributes:
        relation: What the other trace is to this one, in the words of `taskmesh.link`.
        span_id: The span of this trace that is at this end, if the link names one.
    """

    relation: str
    span_id: str
    trace_id: str
    other: Overview | None

    @property
    def label(self) -> str:
        return LABELS.get(self.relation, self.relation.replace("_", " ").capitalize())

    @property
    def backwards(self) -> bool:
        """Whether the other trace came first."""
        return self.relation in BACKWARDS

    def to_json(self) -> dict[str, Any]:
        """The tie, with what is known of the other trace."""
        known = self.other and {
            name: value
            for name, value in self.other.to_json().items()
            if name in {"name", "task", "started_at", "duration_ms", "state", "services"}
        }
        return {"relation": self.relation, "span_id": self.span_id, "trace_id": self.trace_id, "trace": known}


def ties(links: Iterable[Link]) -> list[Tie]:
    """Each tie once, although both ends may have made a link, or only the other one; what came first comes first."""
    found: dict[tuple[str, str], Tie] = {}
    for link in links:
        # A relation that is not ours is told in its maker's words at both ends.
        relation = link.relation if link.outgoing else INVERSE.get(link.relation, link.relation)
        tie = Tie(relation, link.span_id, link.other_trace, link.other)
        found.setdefault((tie.relation, tie.trace_id), tie)
    return sorted(found.values(), key=lambda tie: (not tie.backwards, tie.other.begun if tie.other else 0))
