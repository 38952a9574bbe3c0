"""Why is a task not done? One reason that programs can tell apart, a sentence for people, and what to do about it.

The rules are asked in their order, and the first that applies explains the task: what is certain comes before what is
likely, and what a person has decided before what the machines do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from gateway.cancelling import NO_ROUTE
from gateway.evidence import Evidence, seconds
from gateway.progress import WORKER_LOST
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.relay import ANNOUNCE_SECONDS

SILENT_FOR: Final = timedelta(seconds=3 * ANNOUNCE_SECONDS)
"""A service that has not announced itself for this long is suspicious."""

LATE: Final = timedelta(seconds=5)
"""What has been due for less is on its way."""


class Reason(StrEnum):
    """Why a task is not done."""

    FINISHED = "finished"
    SCHEDULED = "scheduled"
    RELAY_BEHIND = "relay_behind"
    UNROUTABLE = "unroutable"
    BROKER_UNREACHABLE = "broker_unreachable"
    NO_WORKER_ANNOUNCES_TYPE = "no_worker_announces_type"
    NO_CONSUMERS = "no_consumers"
    PAUSED = "paused"
    QUEUED = "queued"
    RUNNING = "running"
    WORKER_LOST = "worker_lost"
    RETRY_DUE = "retry_due"
    CANCEL_REQUESTED = "cancel_requested"
    DEAD_LETTER = "dead_letter"
    UNACCOUNTED = "unaccounted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a rule says of a task.

    Attributes:
        next_at: When something is to happen next, where that is known.
    """

    reason: Reason
    summary: str
    advice: str
    next_at: datetime | None = None


Rule = Callable[[Evidence], Finding | None]


def explain(evidence: Evidence) -> Finding:
    """The first rule's finding that applies."""
    return next(finding for rule in RULES if (finding := rule(evidence)) is not None)


def dead_letter(seen: Evidence) -> Finding | None:
    letter = seen.dead_letter
    if letter is None or seen.state in {TaskState.SUCCEEDED, TaskState.CANCELLED}:
        return None
    because = f": {letter.error}" if letter.error else ""
    return Finding(
        reason=Reason.DEAD_LETTER,
        summary=f"Its message was given up in {letter.queue} ({letter.code or letter.reason}){because}.",
        advice=f"See dead letter {letter.id}; mend the cause, then replay it, or discard it.",
    )


def finished(seen: Evidence) -> Finding | None:
    if not seen.state.terminal:
        return None
    error = seen.task.error
    because = f": {error['code']}: {error['message']}" if error and seen.state is TaskState.FAILED else ""
    retriable = "Retry it to have it tried once more." if seen.state is not TaskState.SUCCEEDED else "Nothing to do."
    follow = f"It was tried again as {seen.task.retried_as}." if seen.task.retried_as else retriable
    return Finding(reason=Reason.FINISHED, summary=f"It has ended, {seen.state}{because}.", advice=follow)


def cancel_requested(seen: Evidence) -> Finding | None:
    if seen.task.cancel_requested_at is None:
        return None
    ago = seconds(seen.now - seen.task.cancel_requested_at)
    summary = f"Its cancellation was asked for {ago} ago, and {seen.task.service} has not answered yet."
    if seen.control is not None and seen.is_fresh(seen.control.observed_at) and not seen.control.consumers:
        return Finding(
            reason=Reason.CANCEL_REQUESTED,
            summary=f"{summary} Nobody takes the control messages of {seen.task.service}.",
            advice=f"Start the relay of {seen.task.service}: it takes them.",
        )
    if seen.state is TaskState.RUNNING:
        return Finding(
            reason=Reason.CANCEL_REQUESTED,
            summary=f"{summary} The task runs, and ends when it next asks whether it is wanted.",
            advice="Wait; or cancel with force, where its type allows that.",
        )
    return Finding(reason=Reason.CANCEL_REQUESTED, summary=summary, advice="Wait a moment.")


def unaccounted(seen: Evidence) -> Finding | None:
    if seen.unaccounted is None:
        return None
    last, where = seen.unaccounted.last_seen_at, seen.unaccounted.last_seen_where
    place = f"; last seen {seconds(seen.now - last)} ago, {where}" if last and where else ""
    return Finding(
        reason=Reason.UNACCOUNTED,
        summary=f"It is in no outbox, queue or inbox since {seconds(seen.now - seen.unaccounted.since)}{place}.",
        advice="The audit sends it again where that is safe; see GET /v1/reconciliation. Retry it otherwise.",
    )


def given_back(seen: Evidence) -> Finding | None:
    message = seen.message
    if message is None or not message.failures:
        return None
    no_route = (message.last_error or "").startswith(NO_ROUTE)
    why = "no queue takes it" if no_route else f"the broker refuses it ({message.last_error})"
    return Finding(
        reason=Reason.UNROUTABLE,
        summary=f"Its message was given back {message.failures} times: {why}.",
        advice=f"Run the setup of {seen.task.service}, which declares its queues."
        if no_route
        else "See what the broker's error says; a full queue empties when workers run.",
        next_at=message.due_at,
    )


def scheduled(seen: Evidence) -> Finding | None:
    due_at = seen.message.due_at if seen.message is not None else seen.task.due_at
    waits = seen.message is not None or seen.state is TaskState.SCHEDULED
    if not waits or due_at is None or due_at <= seen.now:
        return None
    return Finding(
        reason=Reason.SCHEDULED,
        summary=f"It is due in {seconds(due_at - seen.now)}.",
        advice="Wait, or cancel it.",
        next_at=due_at,
    )


def broker_unreachable(seen: Evidence) -> Finding | None:
    waits = seen.message is not None or seen.state in {TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RETRYING}
    if not waits or seen.broker is None or seen.broker.reachable or not seen.is_fresh(seen.broker.observed_at):
        return None
    return Finding(
        reason=Reason.BROKER_UNREACHABLE,
        summary=f"The broker has not answered for {seconds(seen.now - seen.broker.since)}.",
        advice="Bring RabbitMQ back; everything that waits is sent then.",
    )


def relay_behind(seen: Evidence) -> Finding | None:
    if seen.message is None or seen.message.behind <= LATE:
        return None
    ahead, late = seen.message.ahead, seconds(seen.message.behind)
    return Finding(
        reason=Reason.RELAY_BEHIND,
        summary=f"It has not left the gateway: the relay is {late} behind; messages before it: {ahead}.",
        advice="See whether the gateway's relay runs, and what it logs; several may run side by side.",
    )


def retry_due(seen: Evidence) -> Finding | None:
    if seen.state is not TaskState.RETRYING or seen.task.due_at is None or seen.now - seen.task.due_at > LATE:
        return None
    error = seen.task.error or {}
    return Finding(
        reason=Reason.RETRY_DUE,
        summary=f"Attempt {_attempt(seen)} failed ({error.get('code')}: {error.get('message')}); the next one is due.",
        advice="Wait; cancel it if it cannot succeed.",
        next_at=seen.task.due_at,
    )


def _attempt(seen: Evidence) -> str:
    announced = seen.announcement.type if seen.announcement is not None else None
    most = announced.max_attempts if announced is not None else None
    return f"{seen.task.attempt} of {most}" if most is not None else str(seen.task.attempt)


def services_relay_behind(seen: Evidence) -> Finding | None:
    if seen.state not in {TaskState.SCHEDULED, TaskState.RETRYING}:
        return None
    late = f" for {seconds(seen.now - seen.task.due_at)}" if seen.task.due_at is not None else ""
    return Finding(
        reason=Reason.RELAY_BEHIND,
        summary=f"Its message has been due{late}, and has not left {seen.task.service}{_silence(seen)}.",
        advice=f"See whether the relay of {seen.task.service} runs, and what it logs.",
    )


def abandoned(seen: Evidence) -> Finding | None:
    sighting = seen.sighting
    if sighting is None or sighting.alive is not False or not seen.is_fresh(sighting.seen_at):
        return None
    if seen.task.updated_at > sighting.seen_at:
        # It was begun again since.
        return None
    return Finding(
        reason=Reason.WORKER_LOST,
        summary=f"The process that ran it ({sighting.worker}) is gone; {seen.task.service} has not begun it again.",
        advice="The broker delivers it again when it notices; see whether workers run.",
    )


def worker_lost(seen: Evidence) -> Finding | None:
    if seen.state is not TaskState.QUEUED or (seen.task.error or {}).get("code") != WORKER_LOST:
        return None
    ago = seconds(seen.now - seen.task.updated_at)
    return Finding(
        reason=Reason.WORKER_LOST,
        summary=f"The process that ran it ({seen.task.worker}) was lost {ago} ago; it is delivered again.",
        advice="See why the process died: memory, its time limit, or the task itself.",
    )


def running(seen: Evidence) -> Finding | None:
    sighting = seen.sighting
    alive = sighting is not None and sighting.alive is True and seen.is_fresh(sighting.seen_at)
    if seen.state is not TaskState.RUNNING and not alive:
        return None
    began = seen.task.started_at or (sighting.started_at if sighting is not None else None)
    worker = seen.task.worker or (sighting.worker if sighting is not None else None)
    since = f" for {seconds(seen.now - began)}" if began is not None else ""
    announced = seen.announcement.type if seen.announcement is not None else None
    limit = announced.time_limit_seconds if announced is not None else None
    overdue = (
        limit is not None
        and seen.state is TaskState.RUNNING
        and seen.now - seen.task.updated_at > timedelta(seconds=limit + LATE.total_seconds())
    )
    return Finding(
        reason=Reason.RUNNING,
        summary=f"It runs{since} on {worker or 'a worker'}"
        + (f", longer than its limit of {limit:g} s." if overdue else "."),
        advice="Its worker may be lost: see whether it runs; the broker delivers the task again when it notices."
        if overdue
        else "Wait, or cancel it.",
    )


def no_worker_announces_type(seen: Evidence) -> Finding | None:
    announcement = seen.announcement
    if announcement is not None and announcement.type is not None:
        return None
    what = f"announces itself, but not {seen.task.type}" if announcement is not None else "has never announced itself"
    return Finding(
        reason=Reason.NO_WORKER_ANNOUNCES_TYPE,
        summary=f"{seen.task.service} {what}.",
        advice=f"Deploy a release of {seen.task.service} that has this type, or cancel the task.",
    )


def paused(seen: Evidence) -> Finding | None:
    if seen.paused is None:
        return None
    why = f": {seen.paused.pause_reason}" if seen.paused.pause_reason else ""
    return Finding(
        reason=Reason.PAUSED,
        summary=f"{seen.task.service} was paused {seconds(seen.now - seen.paused.paused_at)} ago{why}.",
        advice=f"Resume {seen.task.service} (POST /v1/services/{seen.task.service}:resume).",
    )


def no_consumers(seen: Evidence) -> Finding | None:
    queue = seen.queue
    if queue is None or queue.consumers or not seen.is_fresh(queue.observed_at):
        return None
    return Finding(
        reason=Reason.NO_CONSUMERS,
        summary=f"No worker takes from {seen.queue_name}, where {queue.ready} messages wait{_silence(seen)}.",
        advice=f"Start workers of {seen.task.service}.",
    )


def queued(seen: Evidence) -> Finding:
    """What is left: it waits for its turn."""
    queue = seen.queue
    if queue is None:
        known = "nobody has looked at the queue yet"
    else:
        age = "" if seen.is_fresh(queue.observed_at) else f", as of {seconds(seen.now - queue.observed_at)} ago"
        known = f"{queue.ready} wait there, {queue.unacknowledged} are held by {queue.consumers} consumers{age}"
    silent = _silence(seen)
    return Finding(
        reason=Reason.QUEUED,
        summary=f"It is in {seen.queue_name}, or on its way there: {known}{silent}.",
        advice=f"See whether {seen.task.service} runs." if silent else "Wait, or start more workers.",
    )


def _silence(seen: Evidence) -> str:
    """That the service has not been heard of for suspiciously long, as the end of a sentence."""
    if seen.announcement is None or seen.now - seen.announcement.announced_at <= SILENT_FOR:
        return ""
    return f"; it has not announced itself for {seconds(seen.now - seen.announcement.announced_at)}"


RULES: Final[Sequence[Rule]] = (
    dead_letter,
    finished,
    cancel_requested,
    unaccounted,
    given_back,
    scheduled,
    broker_unreachable,
    relay_behind,
    retry_due,
    services_relay_behind,
    abandoned,
    running,
    no_worker_announces_type,
    paused,
    no_consumers,
    worker_lost,
    queued,
)
