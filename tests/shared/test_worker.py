"""The worker runtime, with a real worker, a real broker and a real database."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from pydantic import SecretStr

from running_orders import Orders
from taskmesh.contracts.lifecycle import TaskFailure
from taskmesh.settings import WorkerSettings
from taskmesh.testing.waiting import eventually
from taskmesh.worker import WorkerApp


def test_a_plain_celery_message_is_executed_once_and_reported(orders: Orders) -> None:
    """A message that knows nothing of Taskmesh runs, and the ledger hears of it."""
    task_id = orders.send("orders.order.place", name="tea")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["tea"]
    event = eventually(lambda: [event for event in orders.events(task_id) if event.state == "succeeded"])[0]
    assert event.result == {"order": "tea"}
    assert event.started_at and event.started_at <= event.at
    assert eventually(orders.idle)


def test_the_same_message_twenty_times_has_one_effect(orders: Orders) -> None:
    """The inbox makes redeliveries harmless."""
    task_id = str(uuid4())
    for _ in range(20):
        orders.send("orders.order.place", task_id=task_id, name="tea")
    last = orders.send("orders.order.place", name="last")

    orders.wait(last)
    assert orders.notes(task_id) == ["tea"]


def test_a_retry_runs_later_and_undoes_what_the_attempt_did(orders: Orders) -> None:
    """`self.retry` rolls the attempt back and goes through the outbox."""
    task_id = orders.send("orders.order.place", name="tea", mode="retry", times=2)

    assert orders.wait(task_id) == "succeeded"
    assert orders.rows("select note, attempt from effects where task_id = %s", task_id) == [("tea", 3)]
    states = eventually(lambda: (s := [e.state for e in orders.events(task_id)]) and s[-1] == "succeeded" and s)
    assert [state for state in states if state not in ("running", "queued")] == ["retrying", "retrying", "succeeded"]
    assert all(event.parent_id is None for event in orders.events(task_id))


def test_a_transient_error_ends_failed_when_retries_are_exhausted(orders: Orders) -> None:
    """Backoff of 1, 2 and 4 seconds is left out of the wait by max_retries 3."""
    task_id = orders.send("orders.order.place", name="tea", mode="transient")

    assert orders.wait(task_id, "failed") == "failed"
    assert orders.notes(task_id) == []
    failure = eventually(lambda: [e for e in orders.events(task_id) if e.state == "failed"])[0].failure
    assert failure is not None and failure.code == "unavailable"


@pytest.mark.parametrize(("mode", "code"), [("permanent", "rejected"), ("bug", "exception")])
def test_a_permanent_error_or_a_bug_fails_the_task_at_once(orders: Orders, mode: str, code: str) -> None:
    """No retry, no effect, and a reason in the ledger that quotes no data."""
    task_id = orders.send("orders.order.place", name="tea", mode=mode)

    assert orders.wait(task_id) == "failed"
    assert orders.notes(task_id) == []
    failure = eventually(lambda: [e for e in orders.events(task_id) if e.state == "failed"])[0].failure
    assert failure is not None and failure.code == code


def test_follow_up_tasks_leave_with_the_commit_and_know_their_parent(orders: Orders) -> None:
    """One goes at once, one when its countdown is over; both carry root and parent."""
    task_id = orders.send("orders.order.place", name="silk", mode="follow")

    orders.wait(task_id)
    written = "select note from effects where note like '%%silk%%' order by note"
    eventually(lambda: orders.rows(written) == [("shipped silk",), ("shipped silk later",), ("silk",)])
    [told] = eventually(lambda: [e for e in orders.events(task_id) if e.state == "succeeded"])
    assert [(child.type, child.state) for child in told.children] == [
        ("orders.order.ship", "queued"),
        ("orders.order.ship", "scheduled"),
    ]
    assert {(str(child.parent_id), str(child.root_id)) for child in told.children} == {(task_id, task_id)}
    placed, later = (
        orders.rows("select at from effects where note = %s", note)[0][0] for note in ("silk", "shipped silk later")
    )
    assert later - placed >= timedelta(seconds=0.3)


def test_an_event_reaches_its_listener_as_a_task_of_its_own(orders: Orders) -> None:
    """The listener's task has an id derived from the event, and the emitting task for a parent."""
    task_id = orders.send("orders.order.place", name="listener retries", mode="emit")

    eventually(lambda: orders.rows("select 1 from effects where note like 'heard%%' and attempt = 2"))
    heard = eventually(
        lambda: [
            e for e in orders.events() if str(e.parent_id) == task_id and e.kind == "event" and e.state == "succeeded"
        ]
    )
    assert len(heard) == 1
    assert str(heard[0].parent_id) == task_id
    assert heard[0].event_id is not None and heard[0].event_id != heard[0].task_id


def test_a_plain_task_with_arguments_runs_as_celery_documents(orders: Orders) -> None:
    """No contract is needed."""
    task_id = orders.send("orders.plain.add", x=2, y=3)

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["5"]


@pytest.mark.parametrize(
    ("way", "followers"),
    [
        ("delay", ["shipped delay"]),
        ("contract", ["shipped contract"]),
        ("signature", ["shipped signature"]),
        ("by name", ["shipped by name"]),
        ("group", ["shipped group 1", "shipped group 2"]),
        ("chain", ["3", "6"]),
        ("link", ["3", "7"]),
    ],
)
def test_celerys_ways_of_sending_go_through_the_outbox(orders: Orders, way: str, followers: list[str]) -> None:
    """Each follower runs once, in the tree of the task that sent it."""
    task_id = orders.send("orders.api.call", way=way)

    assert orders.wait(task_id) == "succeeded"
    eventually(lambda: orders.followers(task_id) == sorted(followers))


def test_replace_goes_on_under_the_same_id(orders: Orders) -> None:
    """The replacement is the task: one id, one outcome, and what the first part wrote counts."""
    task_id = orders.send("orders.api.call", way="replace")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["replace", "21"]


def test_a_task_that_cannot_be_replaced_by_a_chain_says_so(orders: Orders) -> None:
    """Its id would end with the first link, and the last one be taken for a delivery that comes too late."""
    task_id = orders.send("orders.api.call", way="replace by a chain")

    assert orders.wait(task_id) == "failed"
    assert failure_of(orders, task_id).exception == "builtins.NotImplementedError"
    assert orders.followers(task_id) == []


def test_a_direct_call_joins_the_running_transaction(orders: Orders) -> None:
    """Called like a function, a task is a function."""
    task_id = orders.send("orders.api.call", way="direct")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["direct", "15"]


def test_a_retry_without_throw_keeps_what_the_attempt_did(orders: Orders) -> None:
    """The task goes on in a later attempt, and this one counts."""
    task_id = orders.send("orders.api.call", way="quiet retry")

    assert orders.wait(task_id) == "succeeded"
    assert orders.rows("select note, attempt from effects where task_id = %s order by id", task_id) == [
        ("quiet retry", 1),
        ("quiet retry", 2),
    ]


def test_ignore_ends_the_task_as_succeeded(orders: Orders) -> None:
    """The ledger has no word for less."""
    task_id = orders.send("orders.api.call", way="ignore")

    assert orders.wait(task_id) == "succeeded"


def test_a_follow_up_that_expires_before_it_is_due_is_never_run(orders: Orders) -> None:
    """The relay says `expired`, and publishes nothing."""
    task_id = orders.send("orders.api.call", way="expires")

    eventually(lambda: [e for e in orders.events() if str(e.parent_id) == task_id and e.state == "expired"])
    assert orders.followers(task_id) == []


def test_a_follow_up_that_violates_its_contract_fails_its_sender(orders: Orders) -> None:
    """The mistake is seen where it was made."""
    task_id = orders.send("orders.api.call", way="bad payload")

    assert orders.wait(task_id) == "failed"
    failure = eventually(lambda: [e for e in orders.events(task_id) if e.state == "failed"])[0].failure
    assert failure is not None and failure.code == "contract_violation"


def test_link_error_is_sent_when_the_task_fails_and_nothing_else_is(orders: Orders) -> None:
    """The errback leaves with the failure; what the failed task sent does not leave."""
    errback = {"task": "orders.plain.note", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    task_id = orders.send("orders.api.call", way="fail with errback", link_error=errback)

    assert orders.wait(task_id) == "failed"
    eventually(lambda: orders.followers(task_id) == [f"errback {task_id}"])


def test_a_soft_time_limit_inside_a_query_ends_the_attempt_and_the_query(orders: Orders) -> None:
    """The orphaned query holds no lock on the inbox, so the retry succeeds."""
    task_id = orders.send("orders.api.soft_limit")

    assert orders.wait(task_id) == "succeeded"
    assert orders.rows("select note, attempt from effects where task_id = %s", task_id) == [("before the query", 2)]


def test_a_hard_time_limit_kills_the_process_and_the_task_runs_again(orders: Orders) -> None:
    """The message is put back, and the first run has left nothing."""
    task_id = orders.send("orders.api.hard_limit")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["once"]


def test_an_eta_waits_in_the_outbox_and_not_in_the_worker(orders: Orders) -> None:
    """The message is acknowledged at once, and runs when it is due."""
    eta = datetime.now(UTC) + timedelta(seconds=1.5)
    task_id = orders.send("orders.order.place", name="tea", eta=eta)

    assert orders.wait(task_id, "waiting") == "waiting"
    assert orders.wait(task_id) == "succeeded"
    assert orders.rows("select at from effects where task_id = %s", task_id)[0][0] >= eta


def test_a_task_that_is_too_late_ends_expired(orders: Orders) -> None:
    """`expires` in the past is an outcome of its own, not silence."""
    task_id = orders.send("orders.order.place", name="tea", expires=datetime.now(UTC) - timedelta(seconds=5))

    assert orders.wait(task_id) == "expired"
    assert orders.notes(task_id) == []


def test_a_payload_that_violates_its_contract_is_dead_lettered_with_its_reason(orders: Orders) -> None:
    """The ledger learns which field is wrong, and the message is kept."""
    before = orders.dead_letters()
    task_id = orders.send("orders.order.place", name="tea", mode="no such mode")

    failure = eventually(lambda: [e for e in orders.events(task_id) if e.state == "failed"])[0].failure
    assert failure is not None and failure.code == "contract_violation" and "/mode" in failure.message
    assert eventually(lambda: orders.dead_letters() == before + 1)
    assert orders.state(task_id) == "failed"


def test_a_child_killed_before_the_commit_leaves_one_effect(orders: Orders) -> None:
    """The broker brings the message again, and the first run has left nothing."""
    task_id = orders.send("orders.order.place", name="tea", mode="crash_before")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["tea"]


def test_a_task_that_kills_its_worker_ends_failed_as_poison(orders: Orders) -> None:
    """It is not delivered for ever, and a healthy task still runs."""
    task_id = orders.send("orders.plain.poison")

    assert orders.wait(task_id) == "failed"
    failure = eventually(lambda: [e for e in orders.events(task_id) if e.state == "failed"])[0].failure
    assert failure is not None and failure.code == "poison"
    assert orders.wait(orders.send("orders.order.place", name="tea")) == "succeeded"


def test_a_task_may_not_commit_its_session(orders: Orders) -> None:
    """A commit of its own would split the effect from the inbox row."""
    task_id = orders.send("orders.plain.commit")

    assert orders.wait(task_id) == "failed"


def test_steps_commit_on_the_way_and_the_last_transaction_with_the_outcome(orders: Orders) -> None:
    """A failed task keeps its committed steps and nothing else."""
    good = orders.send("orders.steps.run")
    bad = orders.send("orders.steps.run", fail=True)

    assert (orders.wait(good), orders.wait(bad)) == ("succeeded", "failed")
    assert orders.notes(good) == ["step", "last"]
    assert orders.notes(bad) == ["step"]


def test_a_lost_database_connection_in_mid_task_runs_the_task_again_in_place(orders: Orders) -> None:
    """The attempt waits for the database instead of spending the queue's deliveries."""
    orders.events()
    task_id = orders.send("orders.order.place", name="tea", mode="slow")
    eventually(
        lambda: orders.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and state = 'idle in transaction'"
        )
    )

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["tea"]


def test_a_lost_broker_connection_in_mid_task_lets_the_task_finish_once(orders: Orders) -> None:
    """The outcome is committed although it cannot be acknowledged, and the redelivery does nothing."""
    task_id = orders.send("orders.order.place", name="tea", mode="slow")
    eventually(
        lambda: orders.rows(
            "select 1 from pg_stat_activity where datname = current_database() and state = 'idle in transaction'"
        )
    )
    orders.close_connections()

    assert orders.wait(task_id) == "succeeded"
    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.rows("select note, attempt from effects where task_id = %s", task_id) == [("tea", 1)]
    assert not [event for event in orders.events(task_id) if event.state == "failed"]


def test_a_database_that_is_away_for_longer_than_the_soft_time_limit_fails_no_task(orders: Orders) -> None:
    """The message goes back to its queue, and is not parked among the dead letters."""
    name = orders.rows("select current_database()")[0][0]
    before = orders.dead_letters()
    with psycopg.connect(orders.database_url.replace(name, "postgres"), autocommit=True) as server:
        server.execute(f"alter database {name} allow_connections false")
        server.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        task_id = orders.send("orders.api.waits")
        log = orders.health / "worker.log"
        eventually(lambda: "message given back" in log.read_text())
        server.execute(f"alter database {name} allow_connections true")

    assert orders.wait(task_id) == "succeeded"
    assert orders.dead_letters() == before


def test_a_slow_task_is_reported_running(orders: Orders) -> None:
    """The worker's main process tells the ledger, before the outcome is there."""
    task_id = orders.send("orders.order.place", name="tea", mode="slow")

    running = eventually(lambda: [e for e in orders.events(task_id) if e.state == "running"])[0]
    assert running.worker
    assert orders.wait(task_id) == "succeeded"


def test_sigterm_lets_a_running_task_finish(orders: Orders) -> None:
    """Soft shutdown: what ends within its time is acknowledged."""
    task_id = orders.send("orders.order.place", name="tea", mode="slow")
    eventually(
        lambda: orders.rows(
            "select 1 from pg_stat_activity where datname = current_database() and state = 'idle in transaction'"
        )
    )
    orders.processes["worker"].send_signal(signal.SIGTERM)

    assert orders.processes["worker"].wait(timeout=15) is not None
    assert orders.state(task_id) == "succeeded"
    orders.start("worker")


def test_a_killed_worker_loses_nothing(orders: Orders) -> None:
    """SIGKILL in mid-task; the next worker runs it once more."""
    task_id = orders.send("orders.order.place", name="tea", mode="slow")
    eventually(
        lambda: orders.rows(
            "select 1 from pg_stat_activity where datname = current_database() and state = 'idle in transaction'"
        )
    )
    orders.processes["worker"].kill()
    orders.processes["worker"].wait()
    orders.start("worker")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["tea"]


def children_of(pid: int) -> list[int]:
    """The processes of a worker's pool."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


ERRBACK = {"task": "orders.plain.note", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}


def failure_of(orders: Orders, task_id: str) -> TaskFailure:
    """Why the ledger is told that the task failed."""
    [event] = eventually(lambda: [event for event in orders.events(task_id) if event.state == "failed"])
    assert event.failure is not None
    return event.failure


def test_an_effect_that_the_database_refuses_at_the_commit_fails_the_task_at_once(orders: Orders) -> None:
    """A deferred constraint is a bug like any other, and no reason to deliver the message again."""
    task_id = orders.send("orders.api.refused")

    assert orders.wait(task_id) == "failed"
    assert failure_of(orders, task_id).code == "exception"
    assert orders.notes(task_id) == []


def test_a_result_that_the_ledger_cannot_keep_fails_its_task_and_no_other(orders: Orders) -> None:
    """PostgreSQL has no U+0000: the report would take all others of its parcel along to the dead letters."""
    task_id = orders.send("orders.api.unstorable")

    assert orders.wait(task_id) == "failed"
    assert failure_of(orders, task_id).code == "exception"


def test_a_connection_lost_in_a_task_that_hides_it_costs_no_delivery(orders: Orders) -> None:
    """The retry that the task asks for is written by a new connection."""
    task_id = orders.send("orders.api.hides_outage")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["delivered 0 times before"]


def test_a_connection_lost_in_a_task_that_ignores_it_does_not_fail_the_task(orders: Orders) -> None:
    """It runs again in place."""
    task_id = orders.send("orders.api.ignores_outage")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["done"]


def test_a_retry_that_expires_leaves_no_task_waiting(orders: Orders) -> None:
    """The relay does not publish it, and the inbox says so as well as the ledger."""
    expires = datetime.now(UTC) + timedelta(seconds=0.9)
    task_id = orders.send("orders.order.place", name="tea", mode="transient", expires=expires)

    assert orders.wait(task_id) == "expired"
    eventually(lambda: [event for event in orders.events(task_id) if event.state == "expired"])


def test_a_soft_time_limit_inside_a_step_ends_the_step_and_its_query(orders: Orders) -> None:
    """The orphaned query does not go on, and the retry has its turn."""
    task_id = orders.send("orders.steps.hang")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["step"]
    retried = [event for event in orders.events(task_id) if event.state == "retrying"]
    assert [event.failure and event.failure.code for event in retried] == ["time_limit"]


def test_a_duplicate_that_waits_beyond_its_soft_time_limit_does_not_fail_the_task(orders: Orders) -> None:
    """It has not run: what it waits for may yet be undone."""
    task_id = str(uuid4())
    log = orders.health / "worker.log"
    given_back = log.read_text().count("message given back")
    with psycopg.connect(orders.database_url) as first:
        first.execute("insert into inbox (task_id, sequence, state) values (%s, 0, 'succeeded')", (task_id,))
        orders.send("orders.api.waits", task_id=task_id)
        eventually(lambda: log.read_text().count("message given back") > given_back)
        first.rollback()

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["done"]


def test_a_duplicate_costs_its_process_no_connection(orders: Orders) -> None:
    """Each once cancelled a query that nobody ran, and closed the connection."""
    connections = "select pid from pg_stat_activity where datname = current_database() and application_name ~ '^taskmesh-[0-9a-f]+$'"
    log = orders.health / "worker.log"
    task_id = orders.send("orders.order.place", name="once")
    assert orders.wait(task_id) == "succeeded"
    skipped = log.read_text().count("delivery skipped")
    before = orders.rows(connections)

    for _ in range(4):
        orders.send("orders.order.place", task_id=task_id, name="once")
    eventually(lambda: log.read_text().count("delivery skipped") == skipped + 4)

    assert before
    assert set(before) <= set(orders.rows(connections))


def test_a_retry_without_throw_sends_what_is_linked_once(orders: Orders) -> None:
    """The link belongs to the task, which has not ended yet."""
    link = {"task": "orders.plain.note", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    task_id = orders.send("orders.api.call", way="quiet retry", link=link)

    assert orders.wait(task_id) == "succeeded"
    eventually(lambda: orders.followers(task_id))
    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert eventually(orders.idle)
    assert orders.followers(task_id) == ["errback quiet retry"]


def test_a_commit_that_is_lost_loses_no_link(orders: Orders) -> None:
    """What is linked leaves with the run that commits."""
    link = {"task": "orders.plain.note", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    task_id = orders.send("orders.api.cut", link=link)

    assert orders.wait(task_id) == "succeeded"
    eventually(lambda: orders.followers(task_id) == ["errback cut"])


def test_an_errback_that_cannot_be_sent_does_not_keep_the_failure_from_being_told(orders: Orders) -> None:
    """A contract's task takes no id of a failed one."""
    errback = ERRBACK | {"task": "orders.order.ship"}
    task_id = orders.send("orders.api.call", way="fail with errback", link_error=errback)

    assert orders.wait(task_id) == "failed"
    assert failure_of(orders, task_id).code == "rejected"


def test_a_hook_that_fails_costs_no_delivery(orders: Orders) -> None:
    """The failure is committed before the hook is called, and stands."""
    log = orders.health / "worker.log"
    before = len(log.read_text())
    task_id = orders.send("orders.api.hooked")

    assert orders.wait(task_id) == "failed"
    eventually(lambda: "hook failed" in log.read_text()[before:])
    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert "attempt could not be settled" not in log.read_text()[before:]


def test_a_hook_is_not_told_of_a_run_that_a_time_limit_ended(orders: Orders) -> None:
    """The run is repeated: it is no failure yet."""
    log = orders.health / "worker.log"
    before = len(log.read_text())
    task_id = orders.send("orders.api.hooked_hang")

    assert orders.wait(task_id) == "succeeded"
    assert "a hook with a mistake" not in log.read_text()[before:]


def test_a_soft_limit_that_comes_after_an_attempts_end_parks_no_message(orders: Orders) -> None:
    """The task has succeeded: a dead letter would tell the ledger that it failed."""
    before = orders.dead_letters()
    log = orders.health / "worker.log"
    task_id = orders.send("orders.api.late_limit")

    assert orders.wait(task_id) == "succeeded"
    eventually(lambda: "the soft time limit came after the attempt's end" in log.read_text())
    eventually(orders.idle)
    assert orders.dead_letters() == before
    assert orders.notes(task_id) == ["done"]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_every_pool_runs_tasks_and_stops(orders: Orders, pool: str) -> None:
    """A retry, an event and a follow-up go through the outbox there, too, and SIGTERM ends the process."""
    orders.processes["worker"].terminate()
    orders.processes["worker"].wait(timeout=20)
    orders.environment["TASKMESH_WORKER_POOL"] = pool
    try:
        orders.start("worker")
        modes = ["retry", "emit", "follow", "permanent", "slow"]
        sent = [orders.send("orders.order.place", name=pool, mode=mode, times=1) for mode in modes]

        assert [orders.wait(task_id) for task_id in sent] == ["succeeded"] * 3 + ["failed", "succeeded"]
        assert [orders.notes(task_id) for task_id in sent] == [[pool], [pool], [pool], [], [pool]]
        orders.processes["worker"].terminate()
        assert orders.processes["worker"].wait(timeout=20) is not None
        assert not (orders.health / "orders-worker.ready").exists()
    finally:
        del orders.environment["TASKMESH_WORKER_POOL"]
        orders.processes["worker"].kill()
        orders.start("worker")


def test_link_error_is_sent_for_a_poison_task(orders: Orders) -> None:
    """However a task fails, its errback hears of it."""
    task_id = orders.send("orders.plain.poison", link_error=ERRBACK)

    assert orders.wait(task_id) == "failed"
    eventually(lambda: orders.followers(task_id) == [f"errback {task_id}"])


def test_delay_outside_a_task_publishes_at_once(orders: Orders) -> None:
    """A process of the service, such as a script, sends as Celery documents it."""
    app = WorkerApp("orders")

    @app.task(name="orders.plain.add")
    def add(x: int, y: int) -> int:
        return x + y

    app.configure(WorkerSettings(database_url=SecretStr(orders.database_url), amqp_url=SecretStr(orders.amqp_url)))
    task_id = add.delay(x=2, y=5).id

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["7"]


def test_link_error_is_not_sent_for_a_run_that_a_time_limit_ended(orders: Orders) -> None:
    """The task runs again, and succeeds."""
    task_id = orders.send("orders.api.hard_limit", link_error=ERRBACK)

    assert orders.wait(task_id) == "succeeded"
    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.rows("select 1 from effects where note = %s", f"errback {task_id}") == []


def test_a_task_that_outlasts_a_stopping_worker_runs_again(orders: Orders) -> None:
    """Its message goes back to the queue, and the worker leaves no sign of being ready."""
    task_id = orders.send("orders.api.outlasts")
    eventually(
        lambda: orders.rows(
            "select 1 from pg_stat_activity where datname = current_database() and state = 'idle in transaction'"
        )
    )
    orders.processes["worker"].send_signal(signal.SIGTERM)
    assert orders.processes["worker"].wait(timeout=25) is not None
    assert not (orders.health / "orders-worker.ready").exists()
    orders.start("worker")

    assert orders.wait(task_id) == "succeeded"
    assert orders.notes(task_id) == ["done"]
    assert "Ctrl+C" not in (orders.health / "worker.log").read_text()


def test_what_celery_says_is_json_too(orders: Orders) -> None:
    """A process of the pool that was killed is one line among the others."""
    log = orders.health / "worker.log"
    child = children_of(orders.processes["worker"].pid)[0]
    os.kill(child, signal.SIGKILL)

    [line] = eventually(lambda: [line for line in log.read_text().splitlines() if f"pid:{child} exited with" in line])
    assert json.loads(line)["logger"] == "multiprocessing"
