"""What must hold when a campaign is over; each invariant is a function that returns a figure and a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID

from taskmesh_local.faults.evidence import TERMINAL, Evidence
from taskmesh_local.faults.traces import tell_apart
from taskmesh_local.faults.trials.contracts import Follow, Poison, Record, Recorded, Refuse

EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """What one invariant found.

    Attributes:
        figure: What was counted, in a few words.
        faults: What contradicts the invariant; it holds when there is nothing.
        notes: What is to be known although it does not contradict it.
    """

    name: str
    figure: str
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.faults


Invariant = Callable[[Evidence], Finding]


def check(evidence: Evidence) -> list[Finding]:
    """What every invariant finds."""
    return [_checked(invariant, evidence) for invariant in INVARIANTS]


def _checked(invariant: Invariant, evidence: Evidence) -> Finding:
    try:
        return invariant(evidence)
    except Exception as error:  # noqa: BLE001 - one that cannot be checked must not hide what the others found
        return Finding(invariant.__name__, "could not be checked", (f"{type(error).__name__}: {error}",))


def outcomes(evidence: Evidence) -> Finding:
    """Every task of a 202 has exactly one last state."""
    accepted, tasks = evidence.books.accepted, evidence.tasks
    missing = [task_id for task_id in accepted if task_id not in tasks]
    unfinished = [task for task_id in accepted if (task := tasks.get(task_id)) and task.state not in TERMINAL]
    twice = [task_id for task_id in accepted if evidence.endings.get(task_id, 0) > 1]
    return Finding(
        "every 202 has one outcome",
        f"{len(accepted)} accepted: {len(missing)} unknown, {len(unfinished)} unfinished, {len(twice)} ended twice",
        (
            *_told("unknown to the ledger", missing),
            *_told("never finished", (f"{task.id} {task.type} {task.state}" for task in unfinished)),
            *_told("ended more than once", twice),
        ),
    )


def follow_ups(evidence: Evidence) -> Finding:
    """Whatever tasks have started came about once and has ended."""
    tasks = evidence.tasks
    started = [task for task in tasks.values() if task.id not in evidence.books.accepted]
    unfinished = [f"{task.id} {task.type} {task.state}" for task in started if task.state not in TERMINAL]
    children: dict[UUID, Counter[str]] = {}
    for task in started:
        if task.parent_id:
            children.setdefault(task.parent_id, Counter())[task.type] += 1
    wrong = []
    for task in tasks.values():
        wanted = _children(evidence, task.id) if task.state == "succeeded" else {}
        found = dict(children.get(task.id, {}))
        if wanted is not None and found != wanted:
            wrong.append(f"{task.id} {task.type} {task.state}: {found} in place of {wanted}")
    return Finding(
        "every follow-up came about once",
        f"{len(started)} follow-ups: {len(unfinished)} unfinished, {len(wrong)} wrong families",
        (*_told("never finished", unfinished), *_told("wrong family", wrong)),
    )


def _children(evidence: Evidence, task_id: UUID) -> dict[str, int] | None:
    """What a succeeded task has started; None for one of which any number is right."""
    task = evidence.tasks[task_id]
    match task.type:
        case Follow.type_name:
            command = Follow.model_validate(evidence.books.accepted[task_id].tasks[0].payload)
            told = {Recorded.type_name: 1} if command.emit else {}
            return {Record.type_name: command.commands} | told if command.commands else told
        case "billing.invoice.issue":
            return {"billing.document.render": 1}
        case "billing.document.render":
            return {"billing.document.ready": 1}
        case _:
            return {}


def effects(evidence: Evidence) -> Finding:
    """A task that succeeded has left its effect once, and any other task none."""
    trials = [task for task in evidence.tasks.values() if task.service == "trials" and task.type.startswith("trials.")]
    wrong = [
        f"{task.id} {task.type} {task.state}: {evidence.effects[task.id]} effects"
        for task in trials
        if evidence.effects[task.id] not in _effects_of(task.state)
    ]
    strangers = [task_id for task_id in evidence.effects if task_id not in evidence.tasks]
    return Finding(
        "every effect came about once",
        f"{evidence.effects.total()} effects of {len(trials)} tasks: {len(wrong)} wrong, {len(strangers)} of nobody",
        (*_told("wrong number of effects", wrong), *_told("effect of an unknown task", strangers)),
    )


def _effects_of(state: str) -> tuple[int, ...]:
    """How many effects a task in this state may have; the ledger hears of an outcome a moment after it is committed."""
    if state == "succeeded":
        return (1,)
    return (0,) if state in TERMINAL else (0, 1)


def verdicts(evidence: Evidence) -> Finding:
    """Tasks ended as they had to: only those failed that were made to."""
    expected = {Refuse.type_name: {"failed"}, Poison.type_name: {"failed"}}
    cancelled, books = evidence.books.cancelled, evidence.books
    wrong = []
    for task in evidence.tasks.values():
        allowed = set(expected.get(task.type, {"succeeded"}))
        order = books.accepted.get(task.id)
        if order and order.expires is not None:
            allowed.add("expired")
        if task.id in cancelled:
            allowed.add("cancelled")
        if task.state in TERMINAL and task.state not in allowed:
            wrong.append(f"{task.id} {task.type} {task.state} {task.code or ''} after {task.attempt} attempts")
        if task.type == Poison.type_name and task.state == "failed" and task.code != "poison":
            wrong.append(f"{task.id} {task.type} failed as {task.code}")
    states = Counter(task.state for task in evidence.tasks.values())
    return Finding(
        "tasks ended as they had to",
        ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        _told("wrong end", wrong),
    )


def keys(evidence: Evidence) -> Finding:
    """One idempotency key names one task, and no task came from nowhere."""
    books = evidence.books
    ours = {task.api_key_id for task_id in books.accepted if (task := evidence.tasks.get(task_id))}
    ghosts = [
        task.id
        for task in evidence.tasks.values()
        if task.api_key_id in ours and task.schedule_id is None and task.id not in books.accepted
    ]
    refused = [f"{key}: {answer}" for key, answer in books.refused.items()]
    return Finding(
        "one key names one task",
        f"{books.requests} requests, {books.repeated} repeated later: {len(books.contradicted)} contradicted,"
        f" {len(ghosts)} tasks that nobody knows of, {len(refused)} refused",
        (
            *_told("another task for the same key", books.contradicted),
            *_told("task without an answer", ghosts),
            *_told("refused", refused),
        ),
    )


def invoice_numbers(evidence: Evidence) -> Finding:
    """Invoices are numbered from 1 without gap or repeat, one for each task that issued one."""
    rows = evidence.databases.rows(
        "billing",
        "select series, count(*) as count, count(distinct sequence) as numbers, min(sequence) as first,"
        " max(sequence) as last from invoices group by series order by series",
    )
    issued = [task for task in evidence.tasks.values() if task.type == "billing.invoice.issue"]
    succeeded = sum(task.state == "succeeded" for task in issued)
    count = sum(row.count for row in rows)
    wrong = [
        f"series {row.series}: {row.count} invoices, {row.numbers} numbers from {row.first} to {row.last}"
        for row in rows
        if (row.first, row.last, row.numbers) != (1, row.count, row.count)
    ]
    if count != succeeded:
        wrong.append(f"{count} invoices of {succeeded} tasks that succeeded")
    documents = evidence.databases.rows(
        "billing", "select count(*), count(distinct invoice_id) as invoices from documents"
    )[0]
    if tuple(documents) != (succeeded, succeeded):
        wrong.append(f"{documents[0]} documents of {succeeded} invoices")
    return Finding(
        "invoices are numbered without gap or repeat",
        f"{count} invoices of {succeeded} tasks, the last number is {max((row.last for row in rows), default=0)}",
        tuple(wrong),
    )


def postings(evidence: Evidence) -> Finding:
    """Every transaction of the ledger sums to zero, and there is one for each invoice."""
    unbalanced = evidence.databases.rows(
        "billing",
        "select transaction_id, currency, sum(amount_minor) as total from ledger_entries"
        " group by transaction_id, currency having sum(amount_minor) <> 0",
    )
    unposted = evidence.databases.rows(
        "billing",
        "select invoices.id, count(ledger_transactions.id) as count from invoices left join ledger_transactions"
        " on source_id = invoices.id group by invoices.id having count(ledger_transactions.id) <> 1",
    )
    total, count = evidence.databases.rows(
        "billing",
        "select coalesce(sum(amount_minor), 0)::bigint as total, count(distinct transaction_id) from ledger_entries",
    )[0]
    return Finding(
        "the books of billing balance",
        f"{count} transactions, sum {total}",
        (
            *_told("does not sum to zero", (f"{row.transaction_id} {row.currency} {row.total}" for row in unbalanced)),
            *_told("invoice not posted once", (f"{row.id} posted {row.count} times" for row in unposted)),
        ),
    )


def mails(evidence: Evidence) -> Finding:
    """Every mail was received once by its Message-ID, or is counted as ambiguous: SMTP cannot promise more."""
    tasks = [
        task
        for task in evidence.tasks.values()
        if task.state == "succeeded" and task.type in {"email.message.send", "billing.document.ready"}
    ]
    received = evidence.received
    known = {message.header_id: message for message in evidence.messages}
    wrong = [f"{header_id} is of nobody" for header_id in received if header_id not in known]
    ambiguous = 0
    for header_id, message in known.items():
        copies = received[header_id]
        if copies == 0 or copies > 1 + message.resends or message.state != "accepted":
            wrong.append(f"{header_id} {message.state}: received {copies} times, resent {message.resends} times")
        ambiguous += message.resends > 0
    wrong += [f"{task.id} {task.type} has no mail" for task in tasks if task.id not in {m.id for m in known.values()}]
    return Finding(
        "every mail was received once",
        f"{len(known)} mails of {len(tasks)} tasks, {received.total()} received, {ambiguous} ambiguous",
        _told("mail", wrong),
    )


def schedules(evidence: Evidence) -> Finding:
    """Every slot of a schedule fired once, for one task."""
    rows = evidence.databases.rows(
        "gateway", "select fire_at, outcome, reason, task_id from schedule_fires order by fire_at"
    )
    wrong = [f"{row.fire_at} {row.outcome} {row.reason}" for row in rows if row.outcome != "submitted"]
    wrong += [f"{row.fire_at}: no task {row.task_id}" for row in rows if row.task_id not in evidence.tasks]
    moments = [row.fire_at for row in rows]
    steps = {later - earlier for earlier, later in pairwise(moments)}
    if len(steps) > 1:
        wrong.append(f"slots are {', '.join(sorted(str(step) for step in steps))} apart")
    of_schedules = [task for task in evidence.tasks.values() if task.schedule_id]
    if len(of_schedules) != len(rows):
        wrong.append(f"{len(of_schedules)} tasks of {len(rows)} fires")
    return Finding("every slot of a schedule fired once", f"{len(rows)} fires", tuple(wrong))


def inboxes(evidence: Evidence) -> Finding:
    """What the services' inboxes say of a task is what the ledger says of it when it has ended."""
    wrong = [
        f"{row.task_id}: {row.state} in the inbox, {task.state} in the ledger"
        for row in evidence.inboxes.values()
        if (task := evidence.tasks.get(row.task_id)) and task.state in TERMINAL and row.state != task.state
    ]
    strangers = [task_id for task_id in evidence.inboxes if task_id not in evidence.tasks]
    return Finding(
        "inboxes and ledger agree",
        f"{len(evidence.inboxes)} rows: {len(wrong)} disagree, {len(strangers)} unknown to the ledger",
        (*_told("disagreement", wrong), *_told("unknown to the ledger", strangers)),
    )


def outboxes(evidence: Evidence) -> Finding:
    """No outbox holds a row."""
    left = [f"{service}: {count} rows" for service, count in evidence.outboxes.items() if count]
    return Finding("every outbox is empty", f"{sum(evidence.outboxes.values())} rows", tuple(left))


def empty_queues(evidence: Evidence) -> Finding:
    """No queue holds a message."""
    left = [f"{name}: {count} messages" for name, count in evidence.queues.items() if count]
    return Finding(
        "every queue is empty",
        f"{sum(evidence.queues.values())} messages in {len(evidence.queues)} queues",
        tuple(left),
    )


def dead_letters(evidence: Evidence) -> Finding:
    """Only the poison that was planted has become a dead letter."""
    planted = {task.id for task in evidence.tasks.values() if task.type == Poison.type_name}
    strangers = [
        f"{row.id} {row.queue} {row.reason} {row.type} {row.task_id}"
        for row in evidence.dead_letters
        if row.task_id not in planted
    ]
    return Finding(
        "no dead letter that was not planted",
        f"{len(evidence.dead_letters)} dead letters of {len(planted)} poisonous tasks",
        _told("dead letter", strangers),
    )


def reconciliation(evidence: Evidence) -> Finding:
    """The gateway's own audit accounts for every task."""
    name = "reconcile says zero"
    if evidence.audit is None:
        return Finding(name, "nobody audits", ())
    audit = evidence.audit["audit"]
    wrong = [f"{audit[what]} {what}" for what in ("unaccounted", "suspected", "gaps", "unknown") if audit[what]]
    wrong += [f"{task['task_id']} {task['type']} is unaccounted for" for task in evidence.audit["unaccounted"]]
    open_tasks = audit["waiting"] + audit["running"]
    if audit["accepted"] != len(evidence.tasks) or open_tasks:
        wrong.append(f"{audit['accepted']} of {len(evidence.tasks)} tasks, {open_tasks} of them open")
    return Finding(
        name,
        f"{audit['accepted']} accepted = {audit['waiting']} waiting + {audit['running']} running"
        f" + {audit['finished']} finished + {audit['dead']} dead; {audit['unaccounted']} unaccounted",
        tuple(wrong),
    )


def cancellations(evidence: Evidence) -> Finding:
    """What the gateway has called cancelled is cancelled."""
    said = evidence.books.cancelled
    wrong = [
        f"{task_id} {task.type} {task.state} after {task.attempt} attempts"
        for task_id, outcome in said.items()
        if outcome == "cancelled" and (task := evidence.tasks.get(task_id)) and task.state != "cancelled"
    ]
    ended = sum(task.state == "cancelled" for task_id in said if (task := evidence.tasks.get(task_id)))
    answers = ", ".join(f"{count} {answer}" for answer, count in Counter(said.values()).most_common())
    return Finding(
        "what was called cancelled is cancelled",
        f"{len(said)} asked for ({answers}): {ended} ended so",
        _told("called cancelled", wrong),
    )


def traces(evidence: Evidence) -> Finding:
    """No trace is broken but by a process that was killed before it had exported its spans."""
    name = "every trace is whole"
    found = evidence.traces
    if found is None:
        return Finding(name, "nobody collects spans", ())
    lost, orphaned = tell_apart(found.orphans(evidence.tasks), evidence.killed)
    missing, bereft = tell_apart(found.gaps(evidence.tasks), evidence.killed)
    victims = Counter(str(victim) for explanation in (orphaned, bereft) for it in explanation.values() for victim in it)
    return Finding(
        name,
        f"{len(found.spans)} spans of {len(evidence.tasks)} tasks in {found.count} traces, {found.repeated} sent again:"
        f" {len(orphaned)} traces and {len(bereft)} tasks lost spans to processes that were killed",
        (
            *_told("one id for two spans", found.twice),
            *_told("orphan", lost),
            *_told("span missing", missing),
        ),
        tuple(f"spans may have been lost with {victim}: {count}" for victim, count in sorted(victims.items())),
    )


INVARIANTS: tuple[Invariant, ...] = (
    outcomes,
    keys,
    follow_ups,
    effects,
    verdicts,
    cancellations,
    inboxes,
    invoice_numbers,
    postings,
    mails,
    schedules,
    outboxes,
    empty_queues,
    dead_letters,
    reconciliation,
    traces,
)


def _told(what: str, cases: Iterable[object]) -> tuple[str, ...]:
    """The first cases, and how many more there are."""
    listed = [f"{what}: {case}" for case in cases]
    more = len(listed) - EXAMPLES
    return (*listed[:EXAMPLES], *([f"{what}: and {more} more"] if more > 0 else []))
