"""A pool process that has grown too large is replaced between two tasks, and costs none of them anything."""

from __future__ import annotations

from pathlib import Path

from running_orders import orders_service

FRAGILE = Path(__file__).parents[1] / "services" / "fragile_orders.py"


def test_a_process_that_has_grown_too_large_ends_after_its_task(postgres, rabbitmq, tmp_path):
    """Every process is larger than the limit here; each task is run once all the same, by a process of its own."""
    limits = {"TASKMESH_WORKER_CONCURRENCY": "1", "TASKMESH_WORKER_PROCESS_MIB": "64"}
    with orders_service(postgres, rabbitmq, tmp_path, "worker", script=FRAGILE, **limits) as orders:
        tasks = [orders.send("orders.loss.whole") for _ in range(3)]
        for task_id in tasks:
            (tmp_path / f"{task_id}.go").touch()

        assert [orders.wait(task_id) for task_id in tasks] == ["succeeded"] * 3

        processes = [(tmp_path / f"{task_id}.starts").read_text().split() for task_id in tasks]
        assert [len(each) for each in processes] == [1, 1, 1]
        assert len({pid for each in processes for pid in each}) == 3
