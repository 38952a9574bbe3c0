"""What an audit concludes, task by task, from what it has read; touches nothing.

RabbitMQ does not tell which messages are in a queue, only how many. A task whose message is in no outbox, and whose
service has not begun it, is presumed in the queue. Fewer messages than such tasks, and some are missing; none, and all
of them are.

Figures, answers and outboxes are read one after the other while everything moves. So nobody is named at once: a task
is a suspect first, and named when a later audit finds that nothing has happened to it, with figures that were taken in
between. Its message was sent before them, then, and not taken after them: it would have been counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from gateway.candidates import Candidate
from gateway.inquiries import Question
from gateway.observations import QueueFacts
from gateway.sightings import Seen
from gateway.unaccounted import Record, Suspect
from taskmesh.contracts.lifecycle import TERMINAL
from taskmesh.topology import DEAD_QUEUE

FIGURES_LAG: Final = timedelta(seconds=10)
"""How old the management API's figures may be: a queue counts every five seconds, and is asked every five."""

BROKER_UNREACHABLE: Final = "broker_unreachable"
SERVICE_SILENT: Final = "service_silent"
QUEUE_NOT_OBSERVED: Final = "queue_not_observed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What an audit has read.

    Attributes:
        at: When it began; everything else was read later, but for the queues.
        queues: As last observed before the services were asked; None if the broker cannot be reached.
        answers: What services answered to this audit.
        records: Whom earlier audits have suspected or named.
        lag: How old the queues' figures may be beyond what they say.
    """

    at: datetime
    queues: Mapping[str, QueueFacts] | None
    answers: Mapping[Question, Seen]
    records: Mapping[UUID, Record]
    lag: timedelta = FIGURES_LAG

    def since(self, suspect: Suspect) -> datetime | None:
        """Since when nothing has happened to a suspect, as earlier audits have found; None if this is the first."""
        record = self.records.get(suspect.task_id)
        return record.since if record is not None and record.mark == suspect.mark else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A queue that holds messages, but fewer than it must.

    Attributes:
        presumed: Tasks whose message can be nowhere else.
        messages: With the dead letters that are not stored yet.
        missing: How many of them are unaccounted for; nobody can tell which.
    """

    queue: str
    presumed: int
    messages: int
    missing: int


@dataclass(slots=True, kw_only=True)
class Verdicts:
    """What is to be done about each task.

    Attributes:
        accounted: Known to be somewhere.
        suspects: To be looked at again.
        named: Unaccounted for; suspects as well.
        ended: Ended long enough ago, as the service says, and the ledger has not heard: a suspect's last sighting.
        unknown: How many could not be judged, by reason.
    """

    accounted: list[UUID] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    named: list[UUID] = field(default_factory=list)
    ended: list[tuple[Candidate, Seen]] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)


def judge(candidates: Iterable[Candidate], evidence: Evidence) -> Verdicts:
    """Say of each candidate what the evidence says."""
    verdicts = Verdicts()
    presumed: dict[str, list[Suspect]] = {}
    for candidate in candidates:
        if candidate.in_outbox or candidate.is_dead:
            verdicts.accounted.append(candidate.id)
        elif evidence.queues is None:
            verdicts.unknown[BROKER_UNREACHABLE] += 1
        elif (seen := evidence.answers.get((candidate.id, candidate.service))) is None:
            verdicts.unknown[SERVICE_SILENT] += 1
        else:
            _judge_one(candidate, seen, evidence, verdicts, presumed)
    for queue, suspects in presumed.items():
        _judge_queue(queue, suspects, evidence, verdicts)
    return verdicts


def _judge_one(
    candidate: Candidate, seen: Seen, evidence: Evidence, verdicts: Verdicts, presumed: dict[str, list[Suspect]]
) -> None:
    if seen.state in TERMINAL:
        suspect = _suspect(candidate, seen)
        verdicts.suspects.append(suspect)
        since = evidence.since(suspect)
        # Its lifecycle event was written before the first answer that said so, and travels the same way.
        if since is not None and since + evidence.lag <= evidence.at:
            verdicts.ended.append((candidate, seen))
    elif seen.state == "outbox" or (seen.state == "running" and seen.alive):
        verdicts.accounted.append(candidate.id)
    elif seen.state == "unknown" and candidate.sender is not None and candidate.sender not in evidence.answers:
        verdicts.unknown[SERVICE_SILENT] += 1
    elif seen.state == "unknown" and _is_held_by_sender(candidate, evidence):
        verdicts.accounted.append(candidate.id)
    else:
        presumed.setdefault(candidate.queue, []).append(_suspect(candidate, seen))


def _is_held_by_sender(candidate: Candidate, evidence: Evidence) -> bool:
    return candidate.sender is not None and evidence.answers[candidate.sender].state == "outbox"


def _judge_queue(name: str, suspects: Sequence[Suspect], evidence: Evidence, verdicts: Verdicts) -> None:
    assert evidence.queues is not None
    queue = evidence.queues.get(name)
    if queue is None:
        verdicts.unknown[QUEUE_NOT_OBSERVED] += len(suspects)
        return
    # A message that was given up is in neither place until the projector has stored it.
    dead = evidence.queues.get(DEAD_QUEUE)
    messages = queue.messages + (dead.messages if dead is not None else 0)
    if messages >= len(suspects):
        verdicts.accounted += [suspect.task_id for suspect in suspects]
        return
    verdicts.suspects += suspects
    ripe = [
        suspect.task_id
        for suspect in suspects
        if (since := evidence.since(suspect)) is not None and since + evidence.lag <= queue.observed_at
    ]
    if messages == 0:
        verdicts.named += ripe
        return
    named_before = sum(evidence.records[task_id].confirmed_at is not None for task_id in ripe)
    missing = max(len(ripe) - messages - named_before, 0)
    verdicts.gaps.append(Gap(queue=name, presumed=len(suspects), messages=messages, missing=missing))


def _suspect(candidate: Candidate, seen: Seen) -> Suspect:
    at, where = candidate.updated_at, f"ledger: {candidate.state}"
    if seen.state in TERMINAL:
        at, where = seen.seen_at, f"inbox of {seen.service}: {seen.state}"
    elif seen.state == "running":
        at, where = seen.started_at or at, f"begun by {seen.worker or 'a worker'} of {seen.service}, which is gone"
    elif seen.state == "waiting":
        where = f"inbox of {seen.service}: waits for attempt {(seen.starts or 0) + 1}"
    return Suspect(
        task_id=candidate.id,
        service=candidate.service,
        type=candidate.type,
        mark=seen.mark,
        last_seen_at=at,
        last_seen_where=where,
    )
