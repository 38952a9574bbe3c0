"""Invoices: issued once, numbered without gaps, posted, and never changed afterwards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID, uuid4

from sqlalchemy import case, insert, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from billing_worker import amounts, numbering, postings
from billing_worker.errors import IdempotencyMismatch, InvoiceUnknown
from billing_worker.settings import Seller
from billing_worker.tables import invoice_lines, invoice_tax_groups, invoices
from taskmesh.contracts.billing import Buyer, InvoiceIssued, IssueInvoice, Money, TaxCategory


@dataclass(frozen=True, slots=True)
class IssuedInvoice:
    """What became of a wish to issue an invoice."""

    invoice_id: UUID
    number: str
    total: Money
    issued_on: date
    due_on: date
    replayed: bool
    """The invoice was issued before, under the same idempotency key and with the same content."""

    def event(self) -> InvoiceIssued:
        """What the mesh is told of it."""
        return InvoiceIssued(
            invoice_id=self.invoice_id,
            number=self.number,
            total=self.total,
            issued_on=self.issued_on,
            due_on=self.due_on,
        )


@dataclass(frozen=True, slots=True)
class Line:
    position: int
    description: str
    quantity: Decimal
    unit_price: Decimal
    tax_category: TaxCategory
    tax_rate: Decimal
    net_minor: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """An issued invoice with all that is printed on it."""

    id: UUID
    number: str
    currency: str
    seller: Seller
    buyer: Buyer
    buyer_reference: str | None
    supply_date: date | None
    issued_at: datetime
    issued_on: date
    due_on: date
    net_minor: int
    tax_minor: int
    total_minor: int
    lines: tuple[Line, ...]
    tax_groups: tuple[amounts.TaxGroup, ...]


def issue(
    session: Session, command: IssueInvoice, *, idempotency_key: str, seller: Seller, tenant: str = ""
) -> IssuedInvoice:
    """Issue an invoice in the caller's transaction: rows, ledger, and last its number.

    Idempotent by (tenant, idempotency_key): the same content again gives the invoice that exists. A concurrent issue
    under the same key waits here for the first to end.

    Args:
        session: Its commit issues the invoice.
        command: What to invoice; its own idempotency key is not looked at.
        idempotency_key: Names this invoice.
        seller: Who issues it.
        tenant: Keys of different tenants are different keys.

    Raises:
        IdempotencyMismatch: The key belongs to an invoice with other content.
        CurrencyUnknown, AmountOverflow, TotalNegative: See `amounts.calculate`.
    """
    sums = amounts.calculate(command.lines, command.currency)
    payload_sha256 = _digest(command)
    invoice_id = uuid4()
    draft = (
        upsert(invoices)
        .values(
            id=invoice_id,
            tenant=tenant,
            idempotency_key=idempotency_key,
            payload_sha256=payload_sha256,
            status="draft",
            currency=command.currency,
            net_minor=sums.net_minor,
            tax_minor=sums.tax_minor,
            total_minor=sums.total_minor,
            seller=seller.model_dump(mode="json"),
            buyer=command.buyer.model_dump(mode="json"),
            buyer_reference=command.buyer_reference,
            supply_date=command.supply_date,
            due_days=command.due_days,
        )
        .on_conflict_do_nothing(index_elements=[invoices.c.tenant, invoices.c.idempotency_key])
        .returning(invoices.c.id)
    )
    if session.execute(draft).one_or_none() is None:
        return _replay(session, tenant, idempotency_key, payload_sha256)
    _insert_parts(session, invoice_id, command, sums)
    postings.post_invoice(session, invoice_id, sums, command.currency)
    return _finalise(session, invoice_id, seller)


def _insert_parts(session: Session, invoice_id: UUID, command: IssueInvoice, sums: amounts.Amounts) -> None:
    session.execute(
        insert(invoice_lines),
        [
            {
                "invoice_id": invoice_id,
                "position": position,
                "description": line.description,
                "quantity": Decimal(line.quantity),
                "unit_price": Decimal(line.unit_price),
                "tax_category": line.tax.category.value,
                "tax_rate": Decimal(line.tax.rate),
                "net_minor": net_minor,
            }
            for position, (line, net_minor) in enumerate(zip(command.lines, sums.line_nets_minor, strict=True), start=1)
        ],
    )
    session.execute(
        insert(invoice_tax_groups),
        [
            {
                "invoice_id": invoice_id,
                "category": group.category.value,
                "rate": group.rate,
                "taxable_minor": group.taxable_minor,
                "tax_minor": group.tax_minor,
                "exemption_reason": group.exemption_reason,
            }
            for group in sums.tax_groups
        ],
    )


def _finalise(session: Session, invoice_id: UUID, seller: Seller) -> IssuedInvoice:
    taken = numbering.take_number(session, seller=seller.vat_id)
    issued_on = taken.issued_at.astimezone(UTC).date()
    row = session.execute(
        update(invoices)
        .where(invoices.c.id == invoice_id)
        .values(
            # Nothing is owed on an invoice over nothing.
            status=case((invoices.c.total_minor == 0, "paid"), else_="open"),
            series=taken.series,
            sequence=taken.sequence,
            number=taken.number,
            issued_at=taken.issued_at,
            issued_on=issued_on,
            due_on=literal(issued_on) + invoices.c.due_days,
        )
        .returning(invoices)
    ).one()
    return _issued(row, replayed=False)


def _replay(session: Session, tenant: str, idempotency_key: str, payload_sha256: str) -> IssuedInvoice:
    row = session.execute(
        select(invoices).where(invoices.c.tenant == tenant, invoices.c.idempotency_key == idempotency_key)
    ).one()
    if row.payload_sha256 != payload_sha256:
        raise IdempotencyMismatch(f"the idempotency key belongs to invoice {row.number}, which has other content")
    return _issued(row, replayed=True)


def _issued(row: Row[tuple[object, ...]], *, replayed: bool) -> IssuedInvoice:
    return IssuedInvoice(
        invoice_id=row.id,
        number=row.number,
        total=Money(amount_minor=row.total_minor, currency=row.currency),
        issued_on=row.issued_on,
        due_on=row.due_on,
        replayed=replayed,
    )


def _digest(command: IssueInvoice) -> str:
    content = command.model_dump(mode="json", exclude={"idempotency_key"})
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def get_invoice(session: Session, invoice_id: UUID) -> Invoice:
    """The issued invoice, with its lines in order and its tax groups by rate.

    Raises:
        InvoiceUnknown: There is none of that id.
    """
    row = session.execute(
        select(invoices).where(invoices.c.id == invoice_id, invoices.c.status != "draft")
    ).one_or_none()
    if row is None:
        raise InvoiceUnknown(f"there is no invoice {invoice_id}")
    lines = session.execute(
        select(invoice_lines).where(invoice_lines.c.invoice_id == invoice_id).order_by(invoice_lines.c.position)
    )
    groups = session.execute(
        select(invoice_tax_groups)
        .where(invoice_tax_groups.c.invoice_id == invoice_id)
        .order_by(invoice_tax_groups.c.rate.desc(), invoice_tax_groups.c.category)
    )
    return Invoice(
        id=row.id,
        number=row.number,
        currency=row.currency,
        seller=Seller.model_validate(row.seller),
        # What was kept is valid by the contract of its day, which may not be today's.
        buyer=Buyer.model_construct(**{**row.buyer, "address": tuple(row.buyer["address"])}),
        buyer_reference=row.buyer_reference,
        supply_date=row.supply_date,
        issued_at=row.issued_at,
        issued_on=row.issued_on,
        due_on=row.due_on,
        net_minor=row.net_minor,
        tax_minor=row.tax_minor,
        total_minor=row.total_minor,
        lines=tuple(
            Line(
                position=line.position,
                description=line.description,
                quantity=line.quantity,
                unit_price=line.unit_price,
                tax_category=TaxCategory(line.tax_category),
                tax_rate=line.tax_rate,
                net_minor=line.net_minor,
            )
            for line in lines
        ),
        tax_groups=tuple(
            amounts.TaxGroup(
                category=TaxCategory(group.category),
                rate=group.rate,
                taxable_minor=group.taxable_minor,
                tax_minor=group.tax_minor,
                exemption_reason=group.exemption_reason,
            )
            for group in groups
        ),
    )
