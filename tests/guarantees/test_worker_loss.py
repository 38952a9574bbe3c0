"""A worker, a part of it, or what it holds is lost: the task runs again, counted, or ends `failed`; no other is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from running_gateway import Gateway
from taskmesh.testing.waiting import eventually

from .conftest import Fragile

MEMORY_LIMIT_KB = 250 * 1024


def test_worker_sigkill_in_the_child(orders: Fragile, ledger: Gateway) -> None:
    """The first run has left nothing, and counts."""
    task_id = orders.send("orders.loss.kill", times=1)

    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id), ledger.outcome(task_id)["attempt"]) == (2, 2, 2)


def test_worker_sigkill_in_the_parent(orders: Fragile, ledger: Gateway) -> None:
    """Its children end, too; the next worker runs what they ran, and what was waiting in its memory."""
    held = [orders.send("orders.loss.whole") for _ in range(2)]
    for task_id in held:
        orders.started(task_id)
    prefetched = orders.send("orders.loss.whole")
    orders.release(prefetched)
    children = orders.children()

    orders.processes["worker"].kill()
    orders.processes["worker"].wait()
    eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    orders.start("worker")

    tasks = [*held, prefetched]
    assert {ledger.outcome(task_id)["state"] for task_id in tasks} == {"succeeded"}
    assert all(orders.one_effect(task_id) for task_id in tasks)
    assert [orders.attempts(task_id) for task_id in tasks] == [2, 2, 1]


def test_out_of_memory_in_the_child(orders: Fragile, ledger: Gateway) -> None:
    """The kernel kills the process that has taken too much, as this test does in its place: the task runs again."""
    task_id = orders.send("orders.loss.allocate")
    [greedy] = eventually(lambda: [child for child in orders.children() if resident_kb(child) > MEMORY_LIMIT_KB])

    os.kill(greedy, signal.SIGKILL)

    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id)) == (2, 2)


def test_out_of_memory_in_the_parent(orders: Fragile, ledger: Gateway) -> None:
    """A container that exceeds its memory is killed as a whole, all of its processes in one moment."""
    orders.stop_role("worker")
    orders.spawn("worker", start_new_session=True)
    task_id = orders.send("orders.loss.whole")
    orders.started(task_id)

    os.killpg(orders.processes["worker"].pid, signal.SIGKILL)
    orders.processes["worker"].wait()
    orders.start("worker")

    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
    assert orders.attempts(task_id) == 2


def test_hard_time_limit(orders: Fragile, ledger: Gateway) -> None:
    """The process is killed in mid-task; the task runs again."""
    task_id = orders.send("orders.loss.overruns")

    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id)) == (2, 2)


def test_the_main_process_has_an_error_that_nobody_foresaw(orders: Fragile, ledger: Gateway) -> None:
    """It ends at once, with its pool; what ran runs again, and its start is not counted. It had waited for minutes."""
    task_id = orders.send("orders.loss.whole")
    orders.started(task_id)
    children = orders.children()

    (orders.health / "break").touch()

    assert orders.processes["worker"].wait(30) == 1
    eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    orders.start("worker")
    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert orders.one_effect(task_id)
    assert (orders.starts(task_id), orders.attempts(task_id)) == (2, 1)


def test_soft_time_limit_while_a_result_is_written(orders: Fragile, ledger: Gateway) -> None:
    """It was raised in the middle of the result, and the main process ended for a message that it could not read."""
    log = orders.health / "worker.log"
    before = len(log.read_text())
    tasks = [orders.send("orders.loss.late") for _ in range(5)]

    assert {ledger.outcome(task_id)["state"] for task_id in tasks} == {"succeeded"}
    assert ledger.outcome(orders.send("orders.loss.kill", times=0))["state"] == "succeeded"
    # What comes to no end, is given back, or ends a process of the pool is told.
    told = [line for line in log.read_text()[before:].splitlines() if "WARNING" in line or "ERROR" in line]
    assert told == []
    assert [orders.starts(task_id) for task_id in tasks] == [1] * 5


def test_worker_loss_between_a_failure_and_its_dead_letter(orders: Fragile, ledger: Gateway) -> None:
    """The failure is committed and the process gone: the message still comes to the dead letters, and nothing runs."""
    task_id = orders.send("orders.loss.parks")

    assert ledger.outcome(task_id)["state"] == "failed"
    [letter] = eventually(lambda: ledger.letters(task_id), explain=orders.end_of_log)
    assert letter["reason"] == "rejected"
    assert orders.starts(task_id) == 1


def test_hung_task(orders: Fragile, ledger: Gateway) -> None:
    """A task that hangs in each of its runs ends `failed` after its own `max_attempts`."""
    task_id = orders.send("orders.loss.hang")

    outcome = ledger.outcome(task_id)
    assert (outcome["state"], outcome["error"]["code"]) == ("failed", "poison")
    assert orders.starts(task_id) == 2
    assert eventually(lambda: ledger.letters(task_id))


def test_hung_task_in_a_thread(orders: Fragile, ledger: Gateway) -> None:
    """A thread cannot be killed: the worker ends after its other tasks have, and is started again; the start counts."""
    orders.stop_role("worker")
    orders.start("worker", TASKMESH_WORKER_POOL="threads")
    neighbour = orders.send("orders.loss.whole")
    orders.started(neighbour)
    log = orders.health / "worker.log"
    before = len(log.read_text())
    hung = orders.send("orders.loss.hang")
    eventually(lambda: "worker ends" in log.read_text()[before:], explain=orders.end_of_log)
    orders.release(neighbour)

    assert orders.processes["worker"].wait(timeout=120) == os.EX_SOFTWARE
    assert (orders.state(neighbour), orders.starts(neighbour)) == ("succeeded", 1)
    orders.start("worker", TASKMESH_WORKER_POOL="threads")
    assert orders.processes["worker"].wait(timeout=120) == os.EX_SOFTWARE
    orders.start("worker")
    outcome = ledger.outcome(hung)
    assert (outcome["state"], outcome["error"]["code"], outcome["attempt"]) == ("failed", "poison", 2)
    assert orders.starts(hung) == 2


def test_hung_task_in_the_worker_itself(orders: Fragile, ledger: Gateway) -> None:
    """The pool `solo` has no other thread than the one that hangs."""
    orders.stop_role("worker")
    hung = orders.send("orders.loss.hang")
    for _ in range(2):
        orders.spawn("worker", TASKMESH_WORKER_POOL="solo")
        assert orders.processes["worker"].wait(timeout=120) == os.EX_SOFTWARE
    orders.start("worker", TASKMESH_WORKER_POOL="solo")

    assert ledger.outcome(hung)["state"] == "failed"
    assert orders.starts(hung) == 2
    orders.stop_role("worker")


def test_poison_task(orders: Fragile, ledger: Gateway) -> None:
    """It kills its worker's processes until its attempts are spent; a hundred tasks beside it run once each."""
    orders.stop_role("worker")
    healthy = [orders.send("orders.plain.add", x=1, y=n) for n in range(50)]
    poison = orders.send("orders.loss.kill")
    healthy += [orders.send("orders.plain.add", x=2, y=n) for n in range(50)]
    orders.start("worker", TASKMESH_WORKER_CONCURRENCY="4")

    outcome = ledger.outcome(poison)
    assert (outcome["state"], outcome["error"]["code"], outcome["attempt"]) == ("failed", "poison", 3)
    assert orders.starts(poison) == 3
    assert {ledger.outcome(task_id)["state"] for task_id in healthy} == {"succeeded"}
    assert [len(orders.notes(task_id)) for task_id in healthy] == [1] * 100
    assert eventually(lambda: ledger.letters(poison))
    orders.stop_role("worker")


def test_poison_task_that_kills_the_parent(orders: Fragile, ledger: Gateway) -> None:
    """The whole worker dies of it each time, and a supervisor starts it again: its attempts are counted all the same."""
    poison = orders.send("orders.loss.kill", victim="parent")
    neighbour = orders.send("orders.loss.retries")
    deaths = 0
    while not ended(ledger, poison):
        if orders.processes["worker"].poll() is not None:
            deaths += 1
            orders.start("worker")
        assert deaths < 10

    outcome = ledger.outcome(poison)
    assert (outcome["state"], outcome["error"]["code"]) == ("failed", "poison")
    assert orders.starts(poison) == 3
    assert ledger.outcome(neighbour)["state"] == "succeeded"
    assert orders.one_effect(neighbour)


def test_a_retry_after_a_lost_run(orders: Fragile, ledger: Gateway) -> None:
    """Exceptions and lost runs are counted alike."""
    task_id = orders.send("orders.loss.retries")

    assert ledger.outcome(task_id)["state"] == "succeeded"
    assert (orders.starts(task_id), orders.attempts(task_id), ledger.outcome(task_id)["attempt"]) == (2, 2, 2)


def ended(ledger: Gateway, task_id: str) -> bool:
    task = ledger.task(task_id)
    return task is not None and task["state"] in {"succeeded", "failed"}


def resident_kb(pid: int) -> int:
    """How much memory a process holds."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) if lines else 0
