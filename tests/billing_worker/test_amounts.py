"""What an invoice comes to."""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_worker.amounts import Amounts, calculate
from billing_worker.errors import AmountOverflow, CurrencyUnknown, TotalNegative
from taskmesh.contracts.billing import InvoiceLine, IssueInvoice
from taskmesh.money import exponent


def line(unit_price: str, rate: str = "19", quantity: str = "1", **tax: Any) -> InvoiceLine:
    return InvoiceLine.model_validate(
        {"description": "x", "quantity": quantity, "unit_price": unit_price, "tax": {"rate": rate, **tax}}
    )


def decimals(*, min_value: int, places: int) -> st.SearchStrategy[str]:
    # Thirty lines of these, in the currency with the most decimals, stay within the limit of an amount.
    return st.decimals(min_value=min_value, max_value=10**5, places=places, allow_nan=False).map(lambda d: f"{d:f}")


LINES = st.lists(
    st.builds(
        line,
        st.integers(0, 12).flatmap(lambda places: decimals(min_value=-(10**5), places=places)),
        st.sampled_from(["19", "19.00", "7", "10", "8.1", "0.0001", "100"]),
        st.integers(0, 12).flatmap(lambda places: decimals(min_value=0, places=places)),
    )
    | st.builds(lambda price: line(price, "0", category="Z"), decimals(min_value=0, places=3)),
    min_size=1,
    max_size=30,
)


def half_up(value: Fraction) -> int:
    """The reference: round half away from zero, in exact arithmetic."""
    whole, rest = divmod(abs(value), 1)
    rounded = int(whole) + (rest >= Fraction(1, 2))
    return rounded if value >= 0 else -rounded


@given(lines=LINES, currency=st.sampled_from(["EUR", "JPY", "BHD", "CLF"]))
@settings(max_examples=150, deadline=None)
def test_all_sums_follow_from_lines_rounded_once_and_tax_rounded_per_group(
    lines: list[InvoiceLine], currency: str
) -> None:
    scale = 10 ** exponent(currency)
    nets = [half_up(Fraction(item.quantity) * Fraction(item.unit_price) * scale) for item in lines]
    groups: dict[Fraction, int] = {}
    for item, net in zip(lines, nets, strict=True):
        groups[Fraction(item.tax.rate)] = groups.get(Fraction(item.tax.rate), 0) + net
    taxes = {rate: half_up(taxable * rate / 100) for rate, taxable in groups.items()}
    total = sum(nets) + sum(taxes.values())

    if total < 0:
        with pytest.raises(TotalNegative):
            calculate(lines, currency)
        return
    sums = calculate(lines, currency)

    assert list(sums.line_nets_minor) == nets
    assert {Fraction(g.rate): (g.taxable_minor, g.tax_minor) for g in sums.tax_groups} == {
        rate: (groups[rate], taxes[rate]) for rate in groups
    }
    assert (sums.net_minor, sums.tax_minor, sums.total_minor) == (sum(nets), sum(taxes.values()), total)


def test_tax_per_group_is_not_tax_per_line() -> None:
    lines = [line("0.99")] * 45
    with localcontext() as context:
        context.rounding = ROUND_HALF_UP
        per_line = 45 * int((Decimal(99) * Decimal("0.19")).quantize(Decimal(1)))

    sums = calculate(lines, "EUR")

    assert (sums.tax_minor, per_line) == (846, 855)


@pytest.mark.parametrize(
    ("currency", "unit_price", "net_minor"),
    [
        ("EUR", "0.005", 1),
        ("EUR", "-0.005", -1),
        ("EUR", "0.004999999999", 0),
        ("JPY", "0.5", 1),
        ("BHD", "1.0005", 1001),
    ],
)
def test_a_half_is_rounded_away_from_zero(currency: str, unit_price: str, net_minor: int) -> None:
    assert calculate([line("1"), line(unit_price)], currency).line_nets_minor[1] == net_minor


def test_rates_that_are_equal_make_one_group_and_reasons_are_collected() -> None:
    sums = calculate(
        [
            line("1", "7.0"),
            line("1", "7"),
            line("3", "0", category="E", exemption_reason="first"),
            line("3", "0.00", category="E", exemption_reason="second"),
            line("3", "0", category="E", exemption_reason="first"),
        ],
        "EUR",
    )

    assert [(str(g.category), g.taxable_minor, g.exemption_reason) for g in sums.tax_groups] == [
        ("S", 200, None),
        ("E", 900, "first; second"),
    ]


def test_54_digits_are_multiplied_exactly() -> None:
    # 28 digits, Python's default, would lose the last one before the rounding.
    sums = calculate([line("0.000000000001", quantity="499999999999999.500000000000")], "BHD")

    assert sums.line_nets_minor == (500000,)


@pytest.mark.parametrize(
    "lines",
    [
        [line("999999999999999", quantity="999999999999999")],
        [line("50000000000000"), line("50000000000000")],
        [line("90071992547409.91")],
    ],
)
def test_what_is_beyond_exact_json_numbers_is_refused(lines: list[InvoiceLine]) -> None:
    with pytest.raises(AmountOverflow):
        calculate(lines, "EUR")


def test_a_credit_line_may_bring_the_total_to_zero_and_not_below() -> None:
    sums: Amounts = calculate([line("10"), line("-10")], "EUR")

    assert sums.total_minor == 0
    with pytest.raises(TotalNegative):
        calculate([line("10"), line("-10.01")], "EUR")


def test_a_currency_that_is_none_is_refused(command: Callable[..., IssueInvoice]) -> None:
    with pytest.raises(CurrencyUnknown):
        calculate(command().lines, "XAU")
