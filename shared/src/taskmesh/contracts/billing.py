"""What billing understands and what it tells.

Money is integer minor units with an ISO 4217 code (10.00 EUR is 1000, 1000 JPY is 1000, 1.000 BHD is 1000).
Quantities, unit prices and tax rates are decimal strings, so that no float is ever near money.
"""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field, StrictInt, StringConstraints

from taskmesh.contracts._base import Command, Event, Part

Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
Minor = Annotated[StrictInt, Field(ge=-(2**53 - 1), le=2**53 - 1)]
Decimal12 = Annotated[str, StringConstraints(pattern=r"^-?\d{1,15}(\.\d{1,12})?$", max_length=29)]
Rate = Annotated[str, StringConstraints(pattern=r"^\d{1,3}(\.\d{1,4})?$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
EmailAddress = Annotated[str, StringConstraints(pattern=r"^[^@\s<>\",;:]+@[^@\s<>\",;:]+\.[^@\s<>\",;:]+$", max_length=254)]
Locale = Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[A-Z]{2})?$")]


class Money(Part):
    """An amount in minor units of its currency."""

    amount_minor: Minor
    currency: Currency


class Buyer(Part):
    """Whom the invoice is for; kept with the invoice as it was on the day of issue."""

    name: Line
    address: Annotated[tuple[Line, ...], Field(min_length=1, max_length=6)]
    """Address lines in the order in which they are printed."""
    country: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")]
    email: EmailAddress
    locale: Locale = "en"
    vat_id: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}[0-9A-Za-z+*.]{2,13}$")] | None = None


class TaxCategory(StrEnum):
    """EN 16931 (UNCL5305) tax categories."""

    STANDARD = "S"
    ZERO = "Z"
    EXEMPT = "E"
    REVERSE_CHARGE = "AE"
    INTRA_COMMUNITY = "K"
    EXPORT = "G"
    OUT_OF_SCOPE = "O"


class Tax(Part):
    """The tax of one line; `rate` is a percentage and 0 for every category but S."""

    category: TaxCategory = TaxCategory.STANDARD
    rate: Rate
    exemption_reason: Annotated[str, StringConstraints(max_length=200)] | None = None


class InvoiceLine(Part):
    description: Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True)]
    quantity: Decimal12 = "1"
    unit_price: Decimal12
    """Net, in major units of the invoice's currency."""
    tax: Tax


class IssueInvoice(Command, type="billing.invoice.issue"):
    """Issue an invoice: number it, post it, and have its document rendered and mailed.

    The same `idempotency_key` with the same content returns the invoice that exists; with other content the task fails.
    """

    buyer: Buyer
    currency: Currency
    lines: Annotated[tuple[InvoiceLine, ...], Field(min_length=1, max_length=500)]
    due_days: Annotated[StrictInt, Field(ge=0, le=365)] = 14
    supply_date: date | None = None
    buyer_reference: Annotated[str, StringConstraints(max_length=100)] | None = None
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """The caller's own name for this invoice; the task's id when absent."""


class DocumentKind(StrEnum):
    INVOICE = "invoice"


class RenderDocument(Command, type="billing.document.render"):
    """Render an issued invoice as PDF and put it into the object store."""

    invoice_id: UUID
    kind: DocumentKind = DocumentKind.INVOICE


class InvoiceIssued(Event, type="billing.invoice.issued"):
    """An invoice has its number and is posted to the ledger."""

    invoice_id: UUID
    number: str
    total: Money
    issued_on: date
    due_on: date


class DocumentReady(Event, type="billing.document.ready"):
    """The document of an invoice is in the object store, and says whom it is for."""

    document_id: UUID
    invoice_id: UUID
    kind: DocumentKind
    sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0)]
    media_type: str
    filename: str
    invoice_number: str
    total: Money
    due_on: date
    recipient_name: Line
    recipient_email: EmailAddress
    locale: Locale
