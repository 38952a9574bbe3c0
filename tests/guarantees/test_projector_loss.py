"""What the broker hands to the projector is in the ledger once, whatever happens to the projector on the way."""

from __future__ import annotations

from pathlib import Path

from running_gateway import Gateway

from .conftest import Fragile

DYING = Path(__file__).parents[1] / "services" / "dying_projector.py"


def test_a_projector_killed_between_commit_and_ack(orders: Fragile, ledger: Gateway) -> None:
    """Its batch comes again, and changes nothing: neither a task's history nor the dead letters."""
    ledger.stop_role("projector")
    good, bad = orders.send("orders.loss.whole"), orders.send("orders.no.such")
    orders.release(good)
    orders.wait(good)

    ledger.spawn("projector", script=DYING)
    assert ledger.processes["projector"].wait(timeout=120) == -9
    assert ledger.rows("select 1 from tasks") or ledger.rows("select 1 from dead_letters"), "it died after a commit"
    ledger.start("projector")

    assert ledger.outcome(good)["state"] == "succeeded"
    assert ledger.outcome(bad)["state"] == "failed"
    told = [row["state"] for row in ledger.rows("select state from task_events where task_id = %s order by seq", good)]
    assert told.count("succeeded") == 1, told
    assert len(ledger.letters(bad)) == 1


def test_a_projector_killed_at_work(orders: Fragile, ledger: Gateway) -> None:
    """What it held goes to the next one."""
    tasks = [orders.send("orders.loss.whole") for _ in range(20)]
    for task_id in tasks:
        orders.release(task_id)
    ledger.processes["projector"].kill()
    ledger.processes["projector"].wait()
    ledger.start("projector")

    assert {ledger.outcome(task_id)["state"] for task_id in tasks} == {"succeeded"}
