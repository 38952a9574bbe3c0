"""From one HTTP request to a mail with a PDF, in real processes."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
from celery import Celery
from kombu import Exchange
from pypdf import PdfReader

from taskmesh.contracts.billing import IssueInvoice
from taskmesh.testing.waiting import eventually

from .conftest import Mesh


def invoice(address: str, **fields: Any) -> dict[str, Any]:
    """A payload that the gateway accepts."""
    return {
        "buyer": {
            "name": "Ελένη Παπαδοπούλου",
            "address": ["Ερμού 12", "10563 Αθήνα"],
            "country": "GR",
            "email": address,
            "locale": "el",
        },
        "currency": "EUR",
        "lines": [
            {"description": "Hosting", "quantity": "3", "unit_price": "19.99", "tax": {"category": "S", "rate": "24"}}
        ],
        **fields,
    }


def address() -> str:
    return f"buyer-{uuid4().hex[:12]}@customer.example"


def test_an_invoice_is_issued_rendered_and_mailed_in_one_trace(mesh: Mesh) -> None:
    """One request, one tree of tasks, one mail with a readable PDF, one trace without an orphan."""
    to = address()
    with mesh.client() as client:
        task = client.submit("billing.invoice.issue", invoice(to))
        tree = client.wait_tree(task.id, timeout=60)

    assert {part.type: part.state for part in tree} == {
        "billing.invoice.issue": "succeeded",
        "billing.document.render": "succeeded",
        "billing.document.ready": "succeeded",
    }
    [mail] = eventually(lambda: mesh.mails(to))
    inbox = mesh.variables["TASKMESH_INBOX_URL"]
    pdf = httpx.get(f"{inbox}/messages/{mail['id']}/attachments/0", trust_env=False).content
    number = next(part.result["number"] for part in tree if part.type == "billing.invoice.issue")
    text = "".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)
    assert number in text
    assert "Ελένη" in text

    trace = eventually(lambda: (t := mesh.trace(str(task.trace_id))) and _is_whole(t) and t)
    names = [span["name"] for span in trace["spans"]]
    assert [names.count(name) for name in ("POST /v1/tasks", "process billing.invoice.issue", "smtp send")] == [1, 1, 1]
    assert {span["service"] for span in trace["spans"]} == {"gateway", "billing-worker", "email-worker"}
    assert sum(span["parent_id"] is None or span["parent_id"] == "" for span in trace["spans"]) == 1


def _is_whole(trace: dict[str, Any]) -> bool:
    ended = {span["name"] for span in trace["spans"]}
    return "smtp send" in ended and "process billing.document.ready" in ended and trace["orphans"] == 0


def test_one_idempotency_key_from_fifty_threads_is_one_task_one_invoice_one_mail(mesh: Mesh) -> None:
    """Every thread is told of the same task."""
    to, key = address(), uuid4().hex

    def submit(_: int) -> str:
        with mesh.client() as client:
            return str(client.submit("billing.invoice.issue", invoice(to), idempotency_key=key).id)

    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(submit, range(50)))

    assert len(ids) == 1
    with mesh.client() as client:
        client.wait_tree(ids.pop(), timeout=60)
    eventually(lambda: mesh.mails(to))
    assert len(mesh.mails(to)) == 1
    issued = mesh.rows("billing", "select count(*) from invoices where buyer->>'email' = %s", to)
    assert issued == [(1,)]


def test_a_message_of_plain_celery_is_executed_and_appears_in_the_ledger(mesh: Mesh) -> None:
    """No Taskmesh code at the sender."""
    to = address()
    with Celery(broker=mesh.variables["TASKMESH_AMQP_URL"], set_as_current=False) as plain:
        plain.conf.task_create_missing_queues = False
        sent = plain.send_task(
            "billing.invoice.issue",
            kwargs=invoice(to),
            exchange=Exchange("taskmesh.commands", type="topic", no_declare=True),
            routing_key="billing.invoice.issue",
        )

    with mesh.client() as client:
        eventually(lambda: [task for task in client.list(root_id=sent.id) if str(task.id) == sent.id and task.finished])
        assert client.get(sent.id).succeeded
        assert {task.type for task in client.wait_tree(sent.id, timeout=60)} >= {"billing.document.render"}
    assert len(eventually(lambda: mesh.mails(to))) == 1


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"currency": "EURO"}, "/payload/currency"),
        ({"lines": []}, "/payload/lines"),
        ({"due_days": -1}, "/payload/due_days"),
    ],
)
def test_a_bad_payload_is_refused_at_the_door_and_names_the_field(
    mesh: Mesh, change: dict[str, Any], pointer: str
) -> None:
    """Nothing is stored, and the problem document says where to look."""
    to = address()
    with mesh.http() as api:
        answer = api.post("/v1/tasks", json={"type": "billing.invoice.issue", "payload": invoice(to, **change)})

    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] == "contract_violation"
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert mesh.rows("gateway", "select count(*) from tasks where payload->'buyer'->>'email' = %s", to) == [(0,)]


def test_the_contract_and_the_announced_schema_agree(mesh: Mesh) -> None:
    """What Python callers send is what the gateway accepts."""
    with mesh.client() as client:
        announced = client.type("billing.invoice.issue")

    assert announced.payload_schema == IssueInvoice.model_json_schema()
