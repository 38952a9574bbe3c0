"""Every invariant finds what it is there for, and nothing in a mesh where all is well."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from taskmesh.client import Submission
from taskmesh_local.faults import invariants
from taskmesh_local.faults.evidence import Databases, Evidence
from taskmesh_local.faults.killed import Killed, Standstill, told_by_workers
from taskmesh_local.faults.load import Books
from taskmesh_local.faults.orders import Order
from taskmesh_local.faults.traces import Collected, Traces
from taskmesh_local.faults.trials.contracts import Follow, Poison, Record

KEY = uuid4()
AUDIT = {
    "audit": {"accepted": 4, "finished": 3, "dead": 1, "waiting": 0, "running": 0, "unaccounted": 0, "suspected": 0}
    | {"gaps": [], "unknown": {}, "redriven": 0, "mended": 0},
    "unaccounted": [],
}


def task(type_name=Record.type_name, state="succeeded", **fields):
    known = {
        "id": uuid4(),
        "type": type_name,
        "kind": "command",
        "state": state,
        "parent_id": None,
        "schedule_id": None,
        "api_key_id": KEY,
        "service": type_name.partition(".")[0],
        "attempt": 1,
        "code": None,
    }
    return SimpleNamespace(**known | fields)


def order(command):
    return Order(at=0.0, key=str(uuid4()), tasks=(Submission.of(command),))


@pytest.fixture
def world():
    """A record, a poisonous task, and one that another followed: all as it has to be."""
    record, poison = task(), task(Poison.type_name, "failed", code="poison")
    parent = task(Follow.type_name)
    child = task(parent_id=parent.id, api_key_id=None)
    books = Books(
        accepted={record.id: order(Record()), poison.id: order(Poison()), parent.id: order(Follow(commands=1))}
    )
    evidence = Evidence(books, Databases({}), {"trials": 0}, Path(), deepcopy(AUDIT))
    tasks = [record, poison, parent, child]
    # Read from no database.
    vars(evidence).update(
        tasks={each.id: each for each in tasks},
        endings={each.id: 1 for each in tasks},
        effects=Counter({each.id: 1 for each in (record, parent, child)}),
        outboxes={"gateway": 0},
        inboxes={each.id: SimpleNamespace(task_id=each.id, state=each.state) for each in tasks},
        messages=[],
        received=Counter(),
        dead_letters=[SimpleNamespace(id=1, task_id=poison.id, type=poison.type, queue="trials", reason="rejected")],
    )
    return SimpleNamespace(evidence=evidence, record=record, poison=poison, parent=parent, child=child)


CHECKED = (
    invariants.outcomes,
    invariants.keys,
    invariants.follow_ups,
    invariants.effects,
    invariants.verdicts,
    invariants.cancellations,
    invariants.inboxes,
    invariants.mails,
    invariants.outboxes,
    invariants.empty_queues,
    invariants.dead_letters,
    invariants.reconciliation,
)


def broken(world):
    return [invariant for invariant in CHECKED if not invariant(world.evidence).holds]


def test_nothing_is_found_where_all_is_well(world):
    assert broken(world) == []


def test_a_lost_task_is_found(world):
    """It was accepted, and never ended."""
    world.record.state = world.evidence.inboxes[world.record.id].state = "queued"
    world.evidence.effects[world.record.id] = 0

    assert broken(world) == [invariants.outcomes]


def test_a_task_that_ended_twice_is_found(world):
    world.evidence.endings[world.record.id] = 2

    assert broken(world) == [invariants.outcomes]


def test_a_doubled_effect_is_found(world):
    world.evidence.effects[world.record.id] = 2

    assert broken(world) == [invariants.effects]


def test_an_effect_of_a_failed_task_is_found(world):
    world.evidence.effects[world.poison.id] = 1

    assert broken(world) == [invariants.effects]


def test_a_missing_follow_up_is_found(world):
    """Its parent says that it succeeded."""
    del world.evidence.tasks[world.child.id], world.evidence.effects[world.child.id]
    del world.evidence.inboxes[world.child.id]
    world.evidence.audit["audit"]["accepted"] -= 1

    assert broken(world) == [invariants.follow_ups]


def test_a_task_that_failed_for_no_reason_is_found(world):
    world.record.state = world.evidence.inboxes[world.record.id].state = "failed"
    world.evidence.effects[world.record.id] = 0

    assert broken(world) == [invariants.verdicts]


def test_a_task_that_ran_although_it_was_called_cancelled_is_found(world):
    world.evidence.books.cancelled[world.record.id] = "cancelled"

    assert broken(world) == [invariants.cancellations]


def test_a_task_that_nobody_was_told_of_is_found(world):
    """The caller's key made two."""
    del world.evidence.books.accepted[world.record.id]

    assert invariants.keys in broken(world)


def test_an_inbox_that_disagrees_with_the_ledger_is_found(world):
    world.evidence.inboxes[world.record.id].state = "waiting"

    assert broken(world) == [invariants.inboxes]


@pytest.mark.parametrize(("copies", "resends", "holds"), [(1, 0, True), (2, 1, True), (2, 0, False), (0, 0, False)])
def test_a_mail_is_received_once_or_known_to_be_ambiguous(world, copies, resends, holds):
    mail = task("email.message.send")
    world.evidence.tasks[mail.id] = mail
    message = SimpleNamespace(id=mail.id, header_id="<a@b>", state="accepted", resends=resends)
    world.evidence.messages.append(message)
    world.evidence.received["<a@b>"] = copies

    assert invariants.mails(world.evidence).holds is holds


def test_what_is_left_in_an_outbox_or_a_queue_is_found(world):
    world.evidence.outboxes["gateway"] = 1
    world.evidence.queues["trials"] = 1

    assert broken(world) == [invariants.outboxes, invariants.empty_queues]


def test_a_dead_letter_that_nobody_planted_is_found(world):
    world.evidence.dead_letters[0].task_id = world.record.id

    assert broken(world) == [invariants.dead_letters]


@pytest.mark.parametrize("change", [{"unaccounted": 1}, {"suspected": 1}, {"gaps": [{}]}, {"unknown": {"a": 1}}])
def test_what_the_audit_names_is_found(world, change):
    audit = {**AUDIT, "audit": AUDIT["audit"] | change}
    evidence = replace(world.evidence, audit=audit)
    vars(evidence).update(tasks=world.evidence.tasks)

    assert not invariants.reconciliation(evidence).holds


@pytest.fixture
def traced(world):
    """Twenty tasks of a kind: each has a request, a publication and a run, all in its own trace."""
    tasks = [task(created_at=MOMENT, finished_at=MOMENT + timedelta(seconds=2)) for _ in range(20)]
    spans = [span for each in tasks for span in spans_of(each)]
    return SimpleNamespace(tasks=tasks, spans=spans, killed=[], evidence=world.evidence)


MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def spans_of(task):
    begin = int(MOMENT.timestamp() * 1e9)
    places = [
        ("1", "", "POST", "gateway-api"),
        ("2", "1", "publish", "gateway-relay"),
        ("3", "1", "process", "trials-worker"),
    ]
    return [
        Collected(str(task.id), span_id, parent_id, name, role, str(task.id), begin, begin + 1)
        for span_id, parent_id, name, role in places
    ]


def found_in(traced):
    evidence = replace(traced.evidence, killed=traced.killed)
    vars(evidence).update(tasks={each.id: each for each in traced.tasks}, traces=Traces(traced.spans))
    return invariants.traces(evidence)


def killed(role, seconds):
    at = MOMENT.timestamp() + seconds
    return Killed(role=role, pid=1, since=at, at=at)


def test_whole_traces_are_whole(traced):
    finding = found_in(traced)

    assert finding.holds
    assert finding.notes == ()


@pytest.mark.parametrize("span", [0, 1, 2])
def test_a_span_that_is_missing_for_no_reason_is_found(traced, span):
    """With it goes a parent, or only itself."""
    del traced.spans[span]

    assert not found_in(traced).holds


@pytest.mark.parametrize(
    ("role", "seconds", "holds"),
    [
        ("trials-worker", 3, True),
        ("trials-worker", 60, False),
        ("trials-worker", -60, False),
        ("gateway-relay", 3, False),
    ],
)
def test_only_a_process_that_was_killed_in_time_explains_what_is_missing(traced, role, seconds, holds):
    """It was one of those that make such spans, and was killed when it may have held this one."""
    del traced.spans[2]
    traced.killed = [killed(role, seconds)]

    finding = found_in(traced)

    assert finding.holds is holds
    assert len(finding.notes) == holds


@pytest.mark.parametrize(("seconds", "holds"), [(3, True), (-60, False), (60, False)])
def test_an_event_that_its_relay_published_late_lacks_the_parent_that_was_killed_long_before(traced, seconds, holds):
    lost = traced.spans.pop(2)
    late = int((MOMENT + timedelta(seconds=30)).timestamp() * 1e9)
    example = traced.spans[4]
    known = Collected(example.trace_id, "5", example.span_id, "publish event", "trials-relay", None, late, late)
    traced.spans += [known, replace(known, trace_id=lost.trace_id, parent_id=lost.span_id)]
    traced.killed = [killed("trials-worker", seconds)]

    assert found_in(traced).holds is holds


def test_a_span_that_was_sent_again_is_no_fault(traced):
    traced.spans.append(traced.spans[0])

    assert found_in(traced).holds


def test_two_spans_of_one_id_are_found(traced):
    traced.spans.append(replace(traced.spans[0], name="another"))

    assert not found_in(traced).holds


def test_children_that_workers_tell_of_as_killed_are_known(tmp_path):
    """Their times are those of the lines."""
    log = tmp_path / "trials-worker.log"
    line = {"at": MOMENT.isoformat(), "message": "running task has lost its process", "worker": 12}
    log.write_text(f"no JSON\n{json.dumps(line)}\n{json.dumps(line | {'message': 'task failed'})}\n")

    [found] = told_by_workers([("trials-worker", log), ("email-worker", tmp_path / "missing.log")])

    assert (found.role, found.pid, found.at) == ("trials-worker", 12, MOMENT.timestamp())


def test_a_child_that_was_killed_while_its_worker_was_stopped_may_have_gone_then(tmp_path):
    """It was told of eight seconds later, and its last spans were called lost for no reason."""
    log = tmp_path / "trials-worker.log"
    log.write_text(json.dumps({"at": MOMENT.isoformat(), "message": "running task has lost its process", "worker": 12}))
    at = MOMENT.timestamp()
    standstills = [
        Standstill(role="trials-worker", begin=at - 8, end=at - 1),
        Standstill(role="trials-worker", begin=at - 60, end=at - 50),
        Standstill(role="email-worker", begin=at - 20, end=at - 1),
    ]

    [found] = told_by_workers([("trials-worker", log)], standstills)

    assert (found.since, found.at) == (at - 8, at)
