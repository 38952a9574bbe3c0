"""A worker's container is told to stop, or is killed, while it runs tasks and holds others: each is done once in effect.

A service of the tests runs in billing-worker's image, because its tasks wait for a test's word. Needs what
`test_containers.py` needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

import httpx
import pytest

from running_orders import Orders, orders_service
from taskmesh.testing.waiting import eventually

from .test_containers import TAG, podman

SERVICES = Path(__file__).parents[1] / "services"
RUNNING, PREFETCHED = 2, 10
GRACE_SECONDS = 120

pytestmark = [
    pytest.mark.skipif(TAG is None, reason="TASKMESH_TEST_IMAGES does not name the tag of images to run"),
    pytest.mark.timeout(900),
]


@dataclass
class Pods:
    """Workers in containers, beside a relay that is a process of this machine."""

    orders: Orders
    started: list[str] = field(default_factory=list)

    def start(self) -> str:
        """Start one more, and return its name when it is ready."""
        name = f"taskmesh-test-worker-{token_hex(3)}"
        told = {
            variable: value for variable, value in self.orders.environment.items() if variable.startswith("TASKMESH_")
        }
        told |= {
            "TASKMESH_HEALTH_DIR": "/health",
            "TASKMESH_WORKER_CONCURRENCY": str(RUNNING),
            "TASKMESH_SOFT_SHUTDOWN_SECONDS": str(GRACE_SECONDS - 30),
        }
        (self.orders.health / "orders-worker.ready").unlink(missing_ok=True)
        options = ["--read-only", "--cap-drop", "ALL", "--user", "10001:10001", "--network", "host", "--tmpfs", "/tmp"]
        options += ["--volume", f"{SERVICES}:/services:ro", "--volume", f"{self.orders.health}:/health"]
        for variable, value in told.items():
            options += ["--env", f"{variable}={value}"]
        image = f"localhost/taskmesh/billing-worker:{TAG}"
        podman(
            "run",
            "--detach",
            "--name",
            name,
            *options,
            "--entrypoint",
            "python",
            image,
            "/services/prefetching_orders.py",
            "worker",
        )
        self.started.append(name)
        ready = ("python", "-m", "taskmesh.health", "ready", "/health/orders-worker")
        eventually(
            lambda: podman("exec", name, *ready, check=False).returncode == 0,
            seconds=180,
            explain=lambda: podman("logs", name, check=False).stderr[-2000:],
        )
        return name

    def exit_code(self, name: str) -> int:
        return int(podman("wait", name).stdout)

    def remove(self) -> None:
        for name in self.started:
            podman("rm", "--force", "--time", 1, name, check=False)

    def starts(self, task_id: str) -> int:
        trail = self.orders.health / f"{task_id}.starts"
        return len(trail.read_text().splitlines()) if trail.exists() else 0

    def release(self, task_id: str) -> None:
        (self.orders.health / f"{task_id}.go").touch()

    def submit(self) -> tuple[list[str], list[str]]:
        """Twelve tasks, all in one worker's hands: those that have begun and are held, and those that wait there."""
        tasks = [self.orders.send("orders.loss.last") for _ in range(RUNNING + PREFETCHED)]
        eventually(lambda: len(self._begun(tasks)) == RUNNING)
        eventually(lambda: self._held() == RUNNING + PREFETCHED)
        running = self._begun(tasks)
        return running, [task for task in tasks if task not in running]

    def _held(self) -> int:
        """How many messages the broker has given out and not heard of since; its figure is some seconds old."""
        with httpx.Client(base_url=self.orders.management_url, trust_env=False) as management:
            queue = management.get(f"/api/queues/{self.orders.vhost}/orders").raise_for_status().json()
        return int(queue.get("messages_unacknowledged", 0))

    def _begun(self, tasks: list[str]) -> list[str]:
        return [task for task in tasks if self.starts(task)]


@pytest.fixture
def pods(postgres, rabbitmq, tmp_path) -> Iterator[Pods]:
    tmp_path.chmod(0o777)
    with orders_service(postgres, rabbitmq, tmp_path, "relay", script=SERVICES / "fragile_orders.py") as orders:
        found = Pods(orders)
        yield found
        found.remove()


def test_told_to_stop_it_finishes_what_runs_and_leaves_the_rest_to_others(pods):
    """Nothing runs twice, and the container ends well within its grace period."""
    first = pods.start()
    running, waiting = pods.submit()

    podman("kill", "--signal", "TERM", first)
    told_at = time.monotonic()
    pods.start()
    for task_id in (*waiting, *running):
        pods.release(task_id)

    assert pods.exit_code(first) == 0
    assert time.monotonic() - told_at < GRACE_SECONDS
    for task_id in (*running, *waiting):
        assert pods.orders.wait(task_id) == "succeeded"
        assert pods.orders.notes(task_id) == ["done"]
        assert pods.starts(task_id) == 1


def test_killed_what_ran_runs_again_elsewhere_and_everything_is_done_once(pods):
    first = pods.start()
    running, waiting = pods.submit()

    podman("kill", "--signal", "KILL", first)
    pods.start()
    for task_id in (*waiting, *running):
        pods.release(task_id)

    for task_id in (*running, *waiting):
        assert pods.orders.wait(task_id) == "succeeded"
        assert pods.orders.notes(task_id) == ["done"]
    assert [pods.starts(task_id) for task_id in running] == [2] * RUNNING
    assert [pods.starts(task_id) for task_id in waiting] == [1] * PREFETCHED
