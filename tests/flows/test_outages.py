"""What a caller sees while a part is away, and that the work is done afterwards."""

from __future__ import annotations

import httpx
import pytest

from taskmesh.testing.waiting import eventually

from .conftest import Mesh
from .test_invoice import address, invoice


def test_tasks_are_accepted_while_the_broker_is_down_and_done_when_it_is_back(mesh: Mesh) -> None:
    """202 means committed to the gateway's own database, not handed to a broker."""
    to = address()
    mesh.kill("rabbitmq")
    with mesh.http() as api:
        answer = api.post("/v1/tasks", json={"type": "billing.invoice.issue", "payload": invoice(to)})
    assert answer.status_code == httpx.codes.ACCEPTED
    mesh.run("up")

    with mesh.client() as client:
        tree = client.wait_tree(answer.json()["id"], timeout=90)
    assert {task.state for task in tree} == {"succeeded"}
    assert len(eventually(lambda: mesh.mails(to))) == 1


def test_the_gateway_says_when_to_come_back_while_its_database_is_down(mesh: Mesh) -> None:
    """503 with Retry-After, and nothing half-done; the same key then makes one task."""
    to = address()
    body = {"type": "billing.invoice.issue", "payload": invoice(to)}
    key = {"Idempotency-Key": to}
    mesh.kill("postgres")
    with mesh.http() as api:
        answer = api.post("/v1/tasks", json=body, headers=key)
        assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert answer.json()["code"] == "database_unavailable"
        assert int(answer.headers["Retry-After"]) > 0
        mesh.run("up")
        again = eventually(
            lambda: (a := api.post("/v1/tasks", json=body, headers=key)).status_code == httpx.codes.ACCEPTED and a
        )

    with mesh.client() as client:
        tree = client.wait_tree(again.json()["id"], timeout=90)
    assert {task.state for task in tree} == {"succeeded"}
    assert mesh.rows("gateway", "select count(*) from tasks where payload->'buyer'->>'email' = %s", to) == [(1,)]
    assert len(eventually(lambda: mesh.mails(to))) == 1


ROLES = [
    "gateway-api",
    "gateway-relay",
    "gateway-projector",
    "gateway-scheduler",
    "gateway-reconciler",
    "billing-worker",
    "billing-relay",
    "email-worker",
    "email-relay",
    "rabbitmq",
    "postgres",
]


@pytest.mark.timeout(600)
def test_every_process_killed_in_turn_loses_and_doubles_nothing(mesh: Mesh) -> None:
    """An invoice is under way at each kill; all end succeeded, numbered without gap, and mailed once."""
    sent: dict[str, str] = {}
    for name in ROLES:
        with mesh.client(timeout=90) as client:
            for _ in range(3):
                to = address()
                sent[to] = str(client.submit("billing.invoice.issue", invoice(to)).id)
            mesh.kill(name)
            mesh.run("up")

    with mesh.client(timeout=90) as client:
        for task_id in sent.values():
            tree = client.wait_tree(task_id, timeout=120)
            assert {(task.type, task.state) for task in tree} == {
                ("billing.invoice.issue", "succeeded"),
                ("billing.document.render", "succeeded"),
                ("billing.document.ready", "succeeded"),
            }
    assert {to: len(eventually(lambda to=to: mesh.mails(to))) for to in sent} == dict.fromkeys(sent, 1)
    numbers = mesh.rows("billing", "select sequence from invoices order by sequence")
    assert [row[0] for row in numbers] == list(range(1, len(numbers) + 1))
    for service in ("gateway", "billing", "email"):
        eventually(lambda service=service: mesh.rows(service, "select count(*) from outbox") == [(0,)])
