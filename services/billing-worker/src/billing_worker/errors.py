"""Why billing refuses work for good. The `code` is what the ledger and the caller see."""

from __future__ import annotations

from typing import ClassVar

from taskmesh.errors import PermanentError


class IdempotencyMismatch(PermanentError):
    """The idempotency key already belongs to an invoice with other content."""

    code: ClassVar[str] = "idempotency_mismatch"


class CurrencyUnknown(PermanentError):
    """The currency is not in ISO 4217."""

    code: ClassVar[str] = "currency_unknown"


class AmountOverflow(PermanentError):
    """An amount is larger than money is kept here."""

    code: ClassVar[str] = "amount_overflow"


class TotalNegative(PermanentError):
    """The invoice's total is below zero, which takes a credit note instead."""

    code: ClassVar[str] = "total_negative"


class InvoiceUnknown(PermanentError):
    """There is no issued invoice of that id."""

    code: ClassVar[str] = "invoice_unknown"


class RenderingFailed(PermanentError):
    """The template does not compile with this invoice: a fault of ours, to be mended and replayed."""

    code: ClassVar[str] = "rendering_failed"
