"""Rendered documents: which one an invoice has, and where in the object store it is."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from billing_worker.invoices import Invoice
from billing_worker.tables import documents
from taskmesh.contracts.billing import DocumentKind, DocumentReady, Money
from taskmesh.objects import StoredObject


@dataclass(frozen=True, slots=True)
class Document:
    """A file in the object store, and what it is called towards people."""

    id: UUID
    sha256: str
    size_bytes: int
    media_type: str
    filename: str


def find_document(session: Session, invoice_id: UUID, kind: DocumentKind, template_version: int) -> Document | None:
    """The document of that kind and template, or None while there is none."""
    row = session.execute(
        select(
            documents.c.id,
            documents.c.sha256,
            documents.c.size_bytes,
            documents.c.media_type,
            documents.c.filename,
        ).where(
            documents.c.invoice_id == invoice_id,
            documents.c.kind == kind.value,
            documents.c.template_version == template_version,
        )
    ).one_or_none()
    return Document(*row) if row else None


def insert_document(
    session: Session,
    invoice: Invoice,
    kind: DocumentKind,
    stored: StoredObject,
    *,
    template_version: int,
    media_type: str,
) -> Document | None:
    """Record a stored document; None if the invoice already has one of that kind and template.

    Waits for a concurrent insert of the same document, so exactly one of two renderers is told that it was first.
    """
    document = Document(uuid4(), stored.sha256, stored.size_bytes, media_type, f"{invoice.number}.pdf")
    inserted = session.execute(
        insert(documents)
        .values(
            invoice_id=invoice.id,
            kind=kind.value,
            template_version=template_version,
            id=document.id,
            sha256=document.sha256,
            size_bytes=document.size_bytes,
            media_type=document.media_type,
            filename=document.filename,
        )
        .on_conflict_do_nothing()
        .returning(documents.c.id)
    ).one_or_none()
    return document if inserted else None


def ready(document: Document, invoice: Invoice, kind: DocumentKind) -> DocumentReady:
    """What the mesh is told: where the document is, and whom it is for."""
    return DocumentReady(
        document_id=document.id,
        invoice_id=invoice.id,
        kind=kind,
        sha256=document.sha256,
        size_bytes=document.size_bytes,
        media_type=document.media_type,
        filename=document.filename,
        invoice_number=invoice.number,
        total=Money(amount_minor=invoice.total_minor, currency=invoice.currency),
        due_on=invoice.due_on,
        recipient_name=invoice.buyer.name,
        recipient_email=invoice.buyer.email,
        locale=invoice.buyer.locale,
    )
