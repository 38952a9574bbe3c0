"""What an invoice comes to.

Rules (EN 16931): a line's net is quantity times unit price, rounded half up to the minor unit, once. Tax is taken per
group of lines with the same category and rate, on the sum of their rounded nets, and rounded once (BR-CO-17); rounding
tax per line instead gives another total. The sums above that are exact (BR-CO-10, BR-CO-15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Final

from billing_worker.errors import AmountOverflow, CurrencyUnknown, TotalNegative
from taskmesh.contracts.billing import InvoiceLine, TaxCategory
from taskmesh.money import MAX_MINOR, UnknownCurrency, exponent

# Two factors of 27 digits each, and room for the sum of 500 of them: nothing is rounded but where a rule says so.
_EXACT: Final = Context(prec=64, rounding=ROUND_HALF_UP)
_ONE: Final = Decimal(1)


@dataclass(frozen=True, slots=True)
class TaxGroup:
    """The lines that share a tax category and rate."""

    category: TaxCategory
    rate: Decimal
    """Percent."""
    taxable_minor: int
    tax_minor: int
    exemption_reason: str | None
    """The lines' different reasons, in the order of the lines."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """All sums of an invoice, in minor units."""

    line_nets_minor: tuple[int, ...]
    tax_groups: tuple[TaxGroup, ...]
    """Highest rate first."""
    net_minor: int
    tax_minor: int
    total_minor: int


def calculate(lines: Sequence[InvoiceLine], currency: str) -> Amounts:
    """Work out all amounts of an invoice.

    Raises:
        CurrencyUnknown: The currency is not in ISO 4217.
        AmountOverflow: A line, or a sum, is beyond 2^53-1 minor units.
        TotalNegative: The lines come to less than nothing.
    """
    try:
        digits = exponent(currency)
    except UnknownCurrency as error:
        raise CurrencyUnknown(str(error)) from error
    nets = tuple(_line_net(line, digits, position) for position, line in enumerate(lines, start=1))
    groups = _tax_groups(lines, nets)
    net_minor = _within_limit(sum(nets), "net total")
    tax_minor = _within_limit(sum(group.tax_minor for group in groups), "tax total")
    total_minor = _within_limit(net_minor + tax_minor, "total")
    if total_minor < 0:
        raise TotalNegative(f"the total is {total_minor} {currency} minor units; issue a credit note instead")
    return Amounts(nets, groups, net_minor, tax_minor, total_minor)


def _line_net(line: InvoiceLine, digits: int, position: int) -> int:
    product = _EXACT.multiply(Decimal(line.quantity), Decimal(line.unit_price))
    return _within_limit(_round(_EXACT.scaleb(product, digits)), f"net of line {position}")


def _tax_groups(lines: Sequence[InvoiceLine], nets: Sequence[int]) -> tuple[TaxGroup, ...]:
    taxable: dict[tuple[TaxCategory, Decimal], int] = {}
    reasons: dict[tuple[TaxCategory, Decimal], dict[str, None]] = {}
    for line, net in zip(lines, nets, strict=True):
        # Decimals compare by value: 19 and 19.00 are one rate.
        key = (line.tax.category, Decimal(line.tax.rate))
        taxable[key] = taxable.get(key, 0) + net
        if line.tax.exemption_reason:
            reasons.setdefault(key, {})[line.tax.exemption_reason] = None
    return tuple(
        TaxGroup(
            category=category,
            rate=rate,
            taxable_minor=_within_limit(amount, "taxable amount"),
            tax_minor=_round(_EXACT.multiply(Decimal(amount), rate.scaleb(-2))),
            exemption_reason="; ".join(reasons.get((category, rate), ())) or None,
        )
        for (category, rate), amount in sorted(taxable.items(), key=lambda item: (-item[0][1], item[0][0]))
    )


def _round(amount: Decimal) -> int:
    # Half up is half away from zero here, so that a credit line is the mirror image of its debit.
    return int(amount.quantize(_ONE, context=_EXACT))


def _within_limit(amount_minor: int, what: str) -> int:
    if abs(amount_minor) > MAX_MINOR:
        raise AmountOverflow(f"the {what} is beyond {MAX_MINOR} minor units")
    return amount_minor
