"""ISO 4217."""

from __future__ import annotations

from decimal import Decimal

import pytest
from babel.numbers import get_currency_precision

from taskmesh.money import CURRENCIES, EXPONENTS, UnknownCurrency, exponent, to_major


@pytest.mark.parametrize(("currency", "digits"), [("EUR", 2), ("JPY", 0), ("BHD", 3), ("CLF", 4), ("ISK", 0)])
def test_an_exponent_is_the_number_of_decimals_of_the_minor_unit(currency: str, digits: int) -> None:
    assert exponent(currency) == digits


@pytest.mark.parametrize("code", ["XAU", "XXX", "eur", "EURO", ""])
def test_what_has_no_minor_unit_is_no_currency(code: str) -> None:
    with pytest.raises(UnknownCurrency):
        exponent(code)


def test_major_units_are_exact_and_have_all_decimals() -> None:
    assert [str(to_major(1000, code)) for code in ("EUR", "JPY", "BHD")] == ["10.00", "1000", "1.000"]
    assert to_major(-(2**53 - 1), "EUR") == Decimal("-90071992547409.91")


def test_babel_is_not_asked_because_it_rounds_thirteen_currencies() -> None:
    differing = {code for code in CURRENCIES if get_currency_precision(code) != EXPONENTS[code]}

    assert {"IQD", "IRR", "LBP", "RSD"} <= differing
