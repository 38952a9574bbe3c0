"""What billing understands and what it tells.

Money is integer minor units with an ISO 4217 code (10.00 EUR is 1000, 1000 JPY is 1000, 1.000 BHD is 1000).
Quantities, unit prices and tax rates are decimal strings, so that no float is ever near money.

As much as JSON Schema can say is said in the schema, so that whoever validates against it, such as the gateway before
it stores a task, points at the field. What only arithmetic can tell (totals, limits) is left to the service.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, StrictInt, StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from taskmesh.contracts._base import Command, Event, Part
from taskmesh.money import CURRENCIES, EXPONENTS, MAX_MINOR


def _known_currency(value: str) -> str:
    if value not in EXPONENTS:
        raise PydanticCustomError("currency_unknown", "is not an ISO 4217 currency code")
    return value


# Printed text has no control characters (a NUL is even beyond PostgreSQL) and none that reorder their surroundings
# (U+202A-202E, U+2066-2069), which could make a total read as another; and it is not blank.
_UNPRINTED = r"\x00-\x1f\x7f\u2028-\u202e\u2066-\u2069"
_ONE_LINE = rf"^[^{_UNPRINTED}]*[^\s{_UNPRINTED}][^{_UNPRINTED}]*$"

# A named type, so that a schema lists the codes once and refers to them.
Currency = TypeAliasType(
    "Currency",
    Annotated[
        str,
        AfterValidator(_known_currency),
        Field(json_schema_extra={"enum": list(CURRENCIES)}, description="ISO 4217 code.", examples=["EUR"]),
    ],
)
Minor = Annotated[StrictInt, Field(ge=-MAX_MINOR, le=MAX_MINOR)]
Decimal12 = Annotated[str, StringConstraints(pattern=r"^-?[0-9]{1,15}(\.[0-9]{1,12})?$", max_length=29)]
Rate = Annotated[str, StringConstraints(pattern=r"^(100(\.0{1,4})?|[0-9]{1,2}(\.[0-9]{1,4})?)$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True, pattern=_ONE_LINE)]
Reference = Annotated[str, StringConstraints(min_length=1, max_length=100, strip_whitespace=True, pattern=_ONE_LINE)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
EmailAddress = Annotated[
    str,
    StringConstraints(
        pattern=r"^[^@\s<>\",;:()\[\]\\\x00-\x1f\x7f]{1,64}@([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9]$",
        max_length=254,
    ),
    Field(json_schema_extra={"format": "email"}),
]
# EU numbers start with two letters; Japan's with one, Bahrain's with none.
VatId = Annotated[str, StringConstraints(pattern=r"^[0-9A-Z][0-9A-Za-z+*.-]{3,19}$")]
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
    vat_id: VatId | None = None


class TaxCategory(StrEnum):
    """EN 16931 (UNCL5305) tax categories."""

    STANDARD = "S"
    ZERO = "Z"
    EXEMPT = "E"
    REVERSE_CHARGE = "AE"
    INTRA_COMMUNITY = "K"
    EXPORT = "G"
    OUT_OF_SCOPE = "O"


def _when(categories: list[str], then: dict[str, Any], *, default: bool = False) -> dict[str, Any]:
    """A rule for some categories; `default` if it holds when none is given."""
    chosen: dict[str, Any] = {"properties": {"category": {"enum": categories}}}
    return {"if": chosen if default else {**chosen, "required": ["category"]}, "then": then}


# The same rules as `Tax._fits_together`, for those who validate against the schema alone.
_TAX_RULES: dict[str, Any] = {
    "allOf": [
        _when(["S"], {"properties": {"rate": {"pattern": "[1-9]"}}}, default=True),
        _when(["Z", "E", "AE", "K", "G", "O"], {"properties": {"rate": {"pattern": r"^0+(\.0+)?$"}}}),
        _when(["S", "Z"], {"properties": {"exemption_reason": {"type": "null"}}}, default=True),
        _when(["E"], {"required": ["exemption_reason"], "properties": {"exemption_reason": {"type": "string"}}}),
    ]
}


class Tax(Part):
    """The tax of one line; `rate` is a percentage: above 0 for category S, and 0 for every other.

    Category E (exempt) needs its `exemption_reason`; S and Z have none; the others may word theirs.
    """

    model_config = ConfigDict(json_schema_extra=_TAX_RULES)

    category: TaxCategory = TaxCategory.STANDARD
    rate: Rate
    exemption_reason: Line | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Tax:
        taxed = self.category is TaxCategory.STANDARD
        if taxed != (Decimal(self.rate) > 0):
            raise PydanticCustomError("tax_rate", "the rate is above 0 in category S, and 0 in every other")
        if self.category in {TaxCategory.STANDARD, TaxCategory.ZERO} and self.exemption_reason is not None:
            raise PydanticCustomError("tax_exemption", "category S or Z has no exemption reason")
        if self.category is TaxCategory.EXEMPT and self.exemption_reason is None:
            raise PydanticCustomError("tax_exemption", "category E needs an exemption reason")
        return self


class InvoiceLine(Part):
    """One position: quantity times unit price, rounded once to the currency's minor unit."""

    description: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=500,
            strip_whitespace=True,
            pattern=_ONE_LINE.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f"),
        ),
    ]
    """May hold line feeds."""
    quantity: Decimal12 = "1"
    unit_price: Decimal12
    """Net, in major units of the invoice's currency."""
    tax: Tax


_EXAMPLE: dict[str, Any] = {
    "buyer": {
        "name": "Nordwind Handels GmbH",
        "address": ["Speicherstraße 12", "20457 Hamburg"],
        "country": "DE",
        "email": "rechnung@nordwind.example",
        "locale": "de-DE",
        "vat_id": "DE811907980",
    },
    "currency": "EUR",
    "lines": [
        {
            "description": "Consulting, March",
            "quantity": "12.5",
            "unit_price": "140.00",
            "tax": {"category": "S", "rate": "19"},
        }
    ],
    "due_days": 14,
    "buyer_reference": "PO-4711",
}


class IssueInvoice(Command, type="billing.invoice.issue"):
    """Issue an invoice: number it, post it, and have its document rendered and mailed.

    The same `idempotency_key` with the same content returns the invoice that exists; with other content the task fails.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    buyer: Buyer
    currency: Currency
    lines: Annotated[tuple[InvoiceLine, ...], Field(min_length=1, max_length=500)]
    due_days: Annotated[StrictInt, Field(ge=0, le=365)] = 14
    supply_date: date | None = None
    buyer_reference: Reference | None = None
    idempotency_key: Line | None = None
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
