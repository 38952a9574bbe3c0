"""What billing does: the only list of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from billing_worker import documents, invoices, rendering
from billing_worker.rendering import Renderer
from taskmesh import telemetry
from taskmesh.celery_protocol import TENANT_HEADER
from taskmesh.contracts.billing import IssueInvoice, RenderDocument
from taskmesh.metrics import catalogue
from taskmesh.objects import ObjectStore
from taskmesh.worker import MeshTask, WorkerApp

app = WorkerApp("billing")


@dataclass(frozen=True, slots=True)
class Tools:
    """What lives as long as a process: both hold threads that do not survive a fork."""

    renderer: Renderer
    objects: ObjectStore


@cache
def tools() -> Tools:
    """This process's own renderer and object store, made when a task first needs them.

    Not when the process starts: an object store that is away then must put tasks off, not fail them.
    """
    return Tools(Renderer(), ObjectStore.open(app.settings.object_store_url))


@app.task(IssueInvoice)
def issue_invoice(self: MeshTask, command: IssueInvoice) -> dict[str, Any]:
    """Issue an invoice: number it, post it, and have its document rendered and mailed.

    Raises:
        IdempotencyMismatch, CurrencyUnknown, AmountOverflow, TotalNegative: The task fails.
    """
    issued = invoices.issue(
        self.session,
        command,
        idempotency_key=command.idempotency_key or str(self.task_id),
        seller=self.app.settings.seller,
        tenant=(self.request.headers or {}).get(TENANT_HEADER) or "",
    )
    if not issued.replayed:
        self.emit(issued.event())
        self.send(RenderDocument(invoice_id=issued.invoice_id))
        self.after_commit(lambda: catalogue.BILLING_INVOICES.add(currency=command.currency))
    return {
        "invoice_id": str(issued.invoice_id),
        "number": issued.number,
        "total": issued.total.model_dump(),
        "issued_on": issued.issued_on.isoformat(),
        "due_on": issued.due_on.isoformat(),
        "replayed": issued.replayed,
    }


# An object store may be away for longer than a broken connection: 1 + 2 + 4 + ... + 512 seconds, some 17 minutes.
# Killed at any moment it leaves at most a document in the store that no row names, as a crash does.
@app.task(RenderDocument, transaction="last", max_retries=10, force_cancel=True)
def render_document(self: MeshTask, command: RenderDocument) -> dict[str, Any]:
    """Render an issued invoice as PDF and put it into the object store, once for each template.

    Rendering gives the same bytes each time and the store names them by their hash, so a crash after the store has
    them costs nothing; the row that says so commits with the event.

    Raises:
        InvoiceUnknown, RenderingFailed: The task fails.
        ObjectStoreUnavailable: Retried.
        TaskCancelled: The task ends; the invoice stays issued, without its document.
    """
    with self.transaction() as session:
        invoice = invoices.get_invoice(session, command.invoice_id)
        known = documents.find_document(session, invoice.id, command.kind, rendering.TEMPLATE_VERSION)
    if known is not None:
        return _result(known, invoice, stored=False)
    self.raise_if_cancelled()
    with telemetry.tracer().start_as_current_span("render document"):
        content = tools().renderer.render(invoice)
    self.raise_if_cancelled()
    with telemetry.tracer().start_as_current_span("store document"):
        stored = tools().objects.put(content, rendering.MEDIA_TYPE)
    document = documents.insert_document(
        self.session,
        invoice,
        command.kind,
        stored,
        template_version=rendering.TEMPLATE_VERSION,
        media_type=rendering.MEDIA_TYPE,
    )
    if document is None:
        # Another rendering came first, and has told the mesh.
        first = documents.find_document(self.session, invoice.id, command.kind, rendering.TEMPLATE_VERSION)
        if first is None:
            raise RuntimeError(f"the document of invoice {invoice.id} vanished between two statements")
        return _result(first, invoice, stored=False)
    self.emit(documents.ready(document, invoice, command.kind))
    return _result(document, invoice, stored=True)


def _result(document: documents.Document, invoice: invoices.Invoice, *, stored: bool) -> dict[str, Any]:
    return {
        "document_id": str(document.id),
        "invoice_number": invoice.number,
        "sha256": document.sha256,
        "size_bytes": document.size_bytes,
        "stored": stored,
    }
