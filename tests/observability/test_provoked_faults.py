"""Each alert against its fault, in a real mesh under a real Prometheus: it fires while the fault lasts, and is over after it.

Run by `make faults-alerts`; takes ten minutes to a quarter of an hour. docs/runbook.md says of each alert what was tried here.
"""

from __future__ import annotations

import contextlib
import signal

import httpx
import pytest

from taskmesh.testing.waiting import eventually
from taskmesh_local.faults.trials.contracts import Record, Refuse, Steps, Stumble
from watched_mesh import watched_mesh

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def mesh(prometheus, tmp_path_factory):
    """Watched, and warm: a counter is not seen to grow before it was seen at all."""
    with watched_mesh(prometheus, tmp_path_factory.mktemp("watched")) as mesh:
        mesh.run(Record(), Record())
        yield mesh


def test_nothing_fires_while_all_is_well(mesh):
    mesh.is_over(*mesh.prometheus.firing())
    mesh.run(*[Record() for _ in range(20)])

    assert mesh.prometheus.firing() == set()


def test_a_worker_is_gone(mesh):
    """What waits for it fires at once; what ended too late because of it fires when it is back."""
    with mesh.without("trials-worker"):
        tasks = mesh.client.submit_many([Record() for _ in range(30)])
        mesh.fires("TaskmeshRoleGone", "TaskmeshQueueWithoutConsumers", "TaskmeshTasksWait")

    mesh.wait(tasks)
    mesh.fires("TaskmeshTasksFinishLate fast")
    mesh.is_over("TaskmeshRoleGone", "TaskmeshQueueWithoutConsumers", "TaskmeshTasksWait")
    mesh.is_over("TaskmeshTasksFinishLate fast")


def test_the_reconciler_is_gone(mesh):
    with mesh.without("gateway-reconciler"):
        mesh.fires("TaskmeshNoAudit", "TaskmeshRoleGone")

    mesh.is_over("TaskmeshNoAudit", "TaskmeshRoleGone")


def test_the_broker_is_gone(mesh):
    mesh.broker.process.kill()
    try:
        tasks = mesh.client.submit_many([Record() for _ in range(5)])
        mesh.fires("TaskmeshBrokerUnreachable", "TaskmeshOutboxLags")
    finally:
        mesh.broker.start()

    mesh.wait(tasks)
    mesh.is_over("TaskmeshBrokerUnreachable", "TaskmeshOutboxLags")


def test_a_queue_is_gone(mesh):
    """Its messages come back; the service's setup makes it anew."""
    mesh.kill("trials-worker")
    mesh.delete("trials")
    tasks = mesh.client.submit_many([Record() for _ in range(5)])
    mesh.fires("TaskmeshMessagesRefused")

    mesh.set_up("trials-worker")

    mesh.wait(tasks)
    mesh.is_over("TaskmeshMessagesRefused", "TaskmeshRoleGone")


def test_messages_are_lost(mesh):
    """Somebody empties a queue, and the gateway may not send again what was in it."""
    with mesh.without("trials-worker"):
        tasks = mesh.client.submit_many([Record() for _ in range(3)])
        eventually(lambda: mesh.prometheus.query('taskmesh_queue_messages{queue="trials", state="ready"} == 3'))
        mesh.purge("trials")
        mesh.fires("TaskmeshTasksUnaccounted fast")
    for task in tasks:
        mesh.client.cancel(task.id)

    mesh.is_over("TaskmeshTasksUnaccounted fast")


def test_a_dead_letter_grows_old(mesh):
    mesh.publish("trials", b"no Celery message")
    mesh.fires("TaskmeshDeadLettersOld fast")

    mesh.client.dead_letters.discard_many(note="of a trial")

    mesh.is_over("TaskmeshDeadLettersOld fast")


def test_the_projector_hangs(mesh):
    """Again and again, for a few seconds: while it stands still it cannot be asked how late it is."""

    def hang():
        with mesh.stopped("gateway-projector"):
            tasks = mesh.client.submit_many([Record() for _ in range(20)])
            mesh.passes(seconds=6)
        mesh.wait(tasks)

    mesh.run(Record())
    mesh.fires("TaskmeshLedgerLags", meanwhile=hang)
    mesh.is_over("TaskmeshLedgerLags")


def test_the_gateways_database_is_gone(mesh):
    def ask():
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(
                f"{mesh.url}/v1/tasks", headers={"Authorization": f"Bearer {mesh.key}"}, trust_env=False, timeout=10
            )

    mesh.database.process.send(signal.SIGKILL)
    try:
        mesh.fires("TaskmeshGatewayErrors", meanwhile=ask)
    finally:
        mesh.database.start()

    mesh.is_over("TaskmeshGatewayErrors")


def test_schedules_fire_late(mesh):
    schedule = mesh.client.schedules.create("trial", Record(), interval_seconds=1, misfire="all")
    with mesh.without("gateway-scheduler"):
        mesh.passes(seconds=6)

    mesh.fires("TaskmeshSchedulesLate")
    mesh.client.schedules.delete(schedule.id)
    mesh.is_over("TaskmeshSchedulesLate")


def test_there_is_more_work_than_workers(mesh):
    tasks = mesh.client.submit_many([Steps(work_ms=3000) for _ in range(120)])
    mesh.fires("TaskmeshWorkersSaturated")

    for task in tasks:
        mesh.client.cancel(task.id)
    mesh.wait(tasks)
    mesh.is_over("TaskmeshWorkersSaturated")


def test_tasks_fail(mesh):
    mesh.run(Refuse())
    mesh.fires("TaskmeshTasksFail", meanwhile=lambda: mesh.run(Refuse()))

    mesh.is_over("TaskmeshTasksFail")


def test_tasks_are_tried_again_and_again(mesh):
    mesh.run(Stumble(way="error", runs=3))
    mesh.fires("TaskmeshTasksRetry", meanwhile=lambda: mesh.run(*[Stumble(way="error", runs=3)] * 5))

    mesh.is_over("TaskmeshTasksRetry")


def test_the_collector_is_gone(mesh):
    with mesh.without_collector():
        mesh.fires("TaskmeshTelemetryDropped", meanwhile=lambda: mesh.run(*[Record() for _ in range(20)]))

    mesh.is_over("TaskmeshTelemetryDropped")
