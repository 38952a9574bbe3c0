"""Cancelling and pausing, with a real worker, relay, broker and database: whatever the stage, no effect and one word."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pika
import psycopg

from running_orders import Orders
from taskmesh import celery_protocol, control
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.control import Cancellation, Pause
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.management import Management
from taskmesh.outbox import OutboxMessage
from taskmesh.testing.waiting import eventually


def publish(orders: Orders, messages: Sequence[OutboxMessage]) -> None:
    """Send messages as a relay does."""
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for message in messages:
            properties = pika.BasicProperties(**message.properties, headers=message.headers)
            channel.basic_publish(message.exchange, message.routing_key, message.body, properties, message.mandatory)


def cancel(orders: Orders, *task_ids: str, force: bool = False, type_name: str = "orders.order.place") -> None:
    """Ask for cancellations, as the gateway does."""
    now = datetime.now(UTC)
    wanted = [Cancellation(task_id=UUID(it), type=type_name, requested_at=now, force=force) for it in task_ids]
    publish(orders, [control.outgoing("orders", message) for message in wanted])


def pause(orders: Orders, *, paused: bool) -> None:
    publish(orders, [control.outgoing("orders", Pause(paused=paused, at=datetime.now(UTC)))])


def place(orders: Orders, count: int) -> list[str]:
    """Send so many tasks at once."""
    ids = [uuid4() for _ in range(count)]
    payload = {"name": "never"}
    commands = [TaskMessage(type="orders.order.place", id=task_id, payload=payload) for task_id in ids]
    publish(orders, [celery_protocol.command(command) for command in commands])
    return [str(task_id) for task_id in ids]


def emit(orders: Orders, name: str) -> str:
    """Send an event; the id of its listener's task.

    A worker takes as many messages from each queue as it has processes: with one process and a slow command before it,
    the event is in the worker's hands, and waits.
    """
    event = TaskMessage(type="orders.order.placed", id=uuid4(), payload={"name": name}, kind=TaskKind.EVENT)
    publish(orders, [celery_protocol.event(event)])
    return str(celery_protocol.listener_task_id(event.id, "orders"))


def stop(orders: Orders, role: str) -> None:
    orders.processes[role].terminate()
    orders.processes[role].wait(timeout=30)


@contextlib.contextmanager
def one_at_a_time(orders: Orders) -> Iterator[None]:
    """Run the worker with one process for the length of the block."""
    stop(orders, "worker")
    orders.environment["TASKMESH_WORKER_CONCURRENCY"] = "1"
    orders.start("worker")
    try:
        yield
    finally:
        del orders.environment["TASKMESH_WORKER_CONCURRENCY"]
        stop(orders, "worker")
        orders.start("worker")


@contextlib.contextmanager
def logged(orders: Orders, message: str) -> Iterator[None]:
    """Wait, after the block, until the worker has said something once more."""
    log = orders.health / "worker.log"
    before = log.read_text().count(message)
    yield
    eventually(lambda: log.read_text().count(message) > before)


def runs(orders: Orders, task_id: str) -> bool:
    """True while an attempt of the task is under way."""
    [*row] = orders.rows("select started_at is not null from inbox where task_id = %s and state = 'waiting'", task_id)
    return bool(row) and row[0][0]


def starts(orders: Orders, task_id: str) -> int:
    return int(orders.rows("select starts from inbox where task_id = %s", task_id)[0][0])


def told(orders: Orders, task_id: str) -> list[str]:
    """The outcomes that the ledger hears of, once nothing more is on its way."""
    eventually(orders.idle)
    ends = {"succeeded", "failed", "expired", "cancelled"}
    return [event.state for event in orders.events(task_id) if event.state in ends]


def ready(orders: Orders, queue: str = "orders") -> int:
    with pika.BlockingConnection(pika.URLParameters(orders.amqp_url)) as connection:
        return int(connection.channel().queue_declare(queue, passive=True).method.message_count)


def in_hand(orders: Orders, queue: str) -> int:
    """How many of a queue's messages were handed over and are not settled."""
    with Management(orders.management_url) as management:
        return int(management.queue(orders.vhost, queue).get("messages_unacknowledged") or 0)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_task_that_waits_for_its_retry_ends_at_once(orders: Orders) -> None:
    """The attempt that was to come is gone from the outbox."""
    task_id = orders.send("orders.cancel.later")
    eventually(lambda: orders.state(task_id) == "waiting" and not runs(orders, task_id))

    cancel(orders, task_id, type_name="orders.cancel.later")

    assert orders.wait(task_id, "cancelled")
    assert orders.rows("select 1 from outbox where task_id = %s", task_id) == []
    assert told(orders, task_id) == ["cancelled"]


def test_200_tasks_that_were_cancelled_while_no_worker_ran_are_never_run(orders: Orders) -> None:
    """The relay settles them, and the worker that comes up later skips their messages."""
    stop(orders, "worker")
    ids = place(orders, 200)

    cancel(orders, *ids)
    settled = "select count(*) from inbox where task_id = any(%s::uuid[]) and state = 'cancelled'"
    eventually(lambda: orders.rows(settled, ids) == [(200,)])
    orders.start("worker")

    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    eventually(lambda: ready(orders) == 0)
    assert orders.rows("select 1 from effects where task_id = any(%s::uuid[])", ids) == []
    assert orders.rows("select max(starts) from inbox where task_id = any(%s::uuid[])", ids) == [(0,)]
    assert [told(orders, task_id) for task_id in ids[:3]] == [["cancelled"]] * 3


def test_a_worker_hears_of_cancellations_before_it_takes_tasks(orders: Orders) -> None:
    """Not even the relay ran when they were asked for."""
    for role in ("worker", "relay"):
        stop(orders, role)
    ids = place(orders, 50)
    cancel(orders, *ids)
    publish(orders, [OutboxMessage(exchange="taskmesh.direct", routing_key="orders.control", body=b"nonsense")])

    orders.start("worker")

    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.rows("select 1 from effects where task_id = any(%s::uuid[])", ids) == []
    assert [orders.state(task_id) for task_id in ids] == ["cancelled"] * 50
    assert ready(orders, "orders.control") == 0
    orders.start("relay")


def test_a_prefetched_task_is_not_run(orders: Orders) -> None:
    """The worker has its message in hand, behind a slow task."""
    with one_at_a_time(orders):
        slow = orders.send("orders.cancel.loop")
        eventually(lambda: runs(orders, slow))
        prefetched = emit(orders, "never")
        eventually(lambda: in_hand(orders, "orders.events") == 1)

        cancel(orders, prefetched)
        assert orders.wait(prefetched, "cancelled")
        cancel(orders, slow)
        assert orders.wait(slow, "cancelled")

        assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.notes(prefetched) == []
    assert told(orders, prefetched) == ["cancelled"]


def test_a_running_task_that_looks_ends_without_its_effect(orders: Orders) -> None:
    """`raise_if_cancelled` notices within a second or so."""
    task_id = orders.send("orders.cancel.loop")
    eventually(lambda: runs(orders, task_id))

    cancel(orders, task_id)

    assert orders.wait(task_id, "cancelled")
    assert orders.notes(task_id) == []
    assert told(orders, task_id) == ["cancelled"]


def test_a_running_task_is_killed_by_force_and_its_neighbours_are_not(orders: Orders) -> None:
    """The message comes again, and that start finds the cancellation."""
    neighbour = orders.send("orders.cancel.loop")
    task_id = orders.send("orders.cancel.grind")
    eventually(lambda: runs(orders, neighbour) and runs(orders, task_id))
    before = set(children_of(orders.processes["worker"].pid))

    cancel(orders, task_id, force=True, type_name="orders.cancel.grind")

    assert orders.wait(task_id, "cancelled")
    assert orders.notes(task_id) == []
    assert told(orders, task_id) == ["cancelled"]
    assert len(before & set(children_of(orders.processes["worker"].pid))) == len(before) - 1
    assert runs(orders, neighbour)
    assert starts(orders, neighbour) == 1
    cancel(orders, neighbour)
    assert orders.wait(neighbour, "cancelled")


def test_a_task_that_is_killed_by_force_keeps_its_committed_steps(orders: Orders) -> None:
    """It is not begun again."""
    task_id = orders.send("orders.cancel.step")
    eventually(lambda: orders.notes(task_id) == ["start"])

    cancel(orders, task_id, force=True)

    assert orders.wait(task_id, "cancelled")
    assert orders.notes(task_id) == ["start"]
    assert told(orders, task_id) == ["cancelled"]


def test_force_kills_no_task_that_does_not_allow_it(orders: Orders) -> None:
    """It ends when it looks."""
    task_id = orders.send("orders.cancel.loop")
    eventually(lambda: runs(orders, task_id))

    cancel(orders, task_id, force=True)

    assert orders.wait(task_id, "cancelled")
    assert starts(orders, task_id) == 1


def test_a_task_whose_worker_was_killed_ends_cancelled(orders: Orders) -> None:
    """Nobody runs it any more when it is cancelled; its next delivery settles it."""
    task_id = orders.send("orders.cancel.grind")
    eventually(lambda: runs(orders, task_id))
    pid = orders.processes["worker"].pid
    for victim in [pid, *children_of(pid)]:
        os.kill(victim, signal.SIGKILL)
    orders.processes["worker"].wait()

    cancel(orders, task_id)
    eventually(lambda: ready(orders, "orders.control") == 0)
    orders.start("worker")

    assert orders.wait(task_id, "cancelled")
    assert orders.notes(task_id) == []
    assert told(orders, task_id) == ["cancelled"]


def test_a_cancellation_that_comes_too_late_changes_nothing(orders: Orders) -> None:
    task_id = orders.send("orders.order.place", name="tea")
    orders.wait(task_id)

    cancel(orders, task_id, force=True)
    eventually(lambda: orders.rows("select 1 from cancellations where task_id = %s", task_id))

    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.state(task_id) == "succeeded"
    assert orders.notes(task_id) == ["tea"]
    assert told(orders, task_id) == ["succeeded"]


def test_a_paused_worker_finishes_what_runs_and_takes_nothing_until_it_is_resumed(orders: Orders) -> None:
    """What it had in hand goes back to the queue, and a restart does not end the pause."""
    with one_at_a_time(orders):
        running = orders.send("orders.cancel.loop")
        eventually(lambda: runs(orders, running))
        prefetched = emit(orders, "prefetched")
        eventually(lambda: in_hand(orders, "orders.events") == 1)

        pause(orders, paused=True)
        eventually(lambda: ready(orders, "orders.events") == 1)
        waiting = orders.send("orders.order.place", name="waiting")
        cancel(orders, running)
        assert orders.wait(running, "cancelled")

        stop(orders, "worker")
        orders.start("worker")
        assert [ready(orders), ready(orders, "orders.events")] == [1, 1]
        assert [orders.state(prefetched), orders.state(waiting)] == [None, None]

        pause(orders, paused=False)
        assert [orders.wait(prefetched), orders.wait(waiting)] == ["succeeded", "succeeded"]
    assert orders.notes(prefetched) == ["heard prefetched"]


def test_a_lost_connection_does_not_end_a_pause(orders: Orders) -> None:
    """The queues are not consumed from again, until somebody says so."""
    with logged(orders, "worker paused"):
        pause(orders, paused=True)
    log = orders.health / "worker.log"
    connected = log.read_text().count("Connected to amqp")
    # Again and again, because the broker lists a connection only after some seconds.
    eventually(lambda: log.read_text().count("Connected to amqp") > connected or orders.close_connections())
    task_id = orders.send("orders.order.place", name="tea")
    with logged(orders, "worker resumed"):
        assert ready(orders) == 1

        pause(orders, paused=False)

    assert orders.wait(task_id) == "succeeded"


def test_a_worker_that_starts_without_its_database_takes_nothing_until_it_has_it(orders: Orders) -> None:
    """It does not know yet who wants what cancelled, nor whether it is paused."""
    stop(orders, "worker")
    [unwanted] = place(orders, 1)
    [[name]] = orders.rows("select current_database()")
    with psycopg.connect(orders.database_url.replace(name, "postgres"), autocommit=True) as server:
        server.execute(f"alter database {name} allow_connections false")
        server.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        with logged(orders, "control tables cannot be read"):
            orders.spawn("worker")
        cancel(orders, unwanted)
        assert not (orders.health / "orders-worker.ready").exists()
        assert in_hand(orders, "orders") == 0
        assert ready(orders) == 1
        server.execute(f"alter database {name} allow_connections true")

    assert orders.wait(unwanted, "cancelled")
    assert orders.wait(orders.send("orders.order.place", name="last")) == "succeeded"
    assert orders.notes(unwanted) == []


def losses(orders: Orders, task_id: str) -> list[Any]:
    return [event for event in orders.events(task_id) if event.failure and event.failure.code == "worker_lost"]


def test_the_ledger_is_told_of_a_process_that_was_killed(orders: Orders) -> None:
    """The task is back in its queue, and why."""
    task_id = orders.send("orders.order.place", name="tea", mode="crash_before")

    [loss] = eventually(lambda: losses(orders, task_id))

    assert (loss.state, loss.sequence) == ("queued", 0)
    assert loss.failure.message == "Worker exited prematurely: signal 9 (SIGKILL)"
    assert loss.worker
    assert orders.wait(task_id) == "succeeded"


def test_the_ledger_is_told_of_a_hard_time_limit(orders: Orders) -> None:
    task_id = orders.send("orders.api.hard_limit")

    [loss] = eventually(lambda: losses(orders, task_id))

    assert loss.failure.message == "Worker killed: the hard time limit of 1 s was exceeded"
    assert orders.wait(task_id) == "succeeded"
