"""What is printed, in the reader's own way of writing it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from decimal import Decimal

import pytest

from billing_worker import labels
from billing_worker.invoices import Invoice
from billing_worker.layout import Language, lay_out

NBSP, RLM = "\u00a0", "\u200f"


@pytest.mark.parametrize(
    ("tag", "amount_minor", "currency", "printed"),
    [
        ("de-DE", 123456789, "EUR", f"1.234.567,89{NBSP}€"),
        ("en-GB", 123456, "EUR", "€1,234.56"),
        ("en", -5, "USD", "-$0.05"),
        ("fr-FR", 123456, "EUR", f"1\u202f234,56{NBSP}€"),
        ("el", 123456, "EUR", f"1.234,56{NBSP}€"),
        ("ja-JP", 123456, "JPY", "￥123,456"),
        ("ar-BH", 1234500, "BHD", f"1,234.500{NBSP}د.ب.{RLM}"),
        ("en", 100050, "LBP", f"LBP{NBSP}1,000.50"),
        ("en", 100050, "ISK", f"ISK{NBSP}100,050"),
    ],
)
def test_money_has_the_currency_s_decimals_in_the_reader_s_format(
    tag: str, amount_minor: int, currency: str, printed: str
) -> None:
    money = Language.of(tag).money(amount_minor, currency)

    assert money.strip(RLM) == printed.strip(RLM)


@pytest.mark.parametrize(
    ("price", "printed"), [("140", "140.00"), ("0.0042", "0.0042"), ("1.500", "1.50"), ("1E+3", "1,000.00")]
)
def test_a_unit_price_keeps_its_own_decimals(price: str, printed: str) -> None:
    assert Language.of("en").price(Decimal(price), "EUR") == printed


def test_quantities_rates_and_dates_are_written_out() -> None:
    german = Language.of("de")

    assert german.quantity(Decimal("1843.2170")) == "1.843,217"
    assert german.quantity(Decimal(100)) == "100"
    assert german.percent(Decimal("19.00")) == f"19{NBSP}%"
    assert german.percent(Decimal("8.1")) == f"8,1{NBSP}%"
    assert german.day(date(2026, 3, 14)) == "14. März 2026"


@pytest.mark.parametrize(
    ("tag", "language"),
    [("de-AT", "de"), ("fr-XX", "fr"), ("ar", "ar"), ("sv-SE", "en"), ("tlh", "en"), ("xx-YY", "en")],
)
def test_a_language_without_words_reads_english_throughout(tag: str, language: str) -> None:
    chosen = Language.of(tag)

    assert chosen.locale.language == language
    assert chosen.labels is labels.for_language(language)


def test_untaxed_groups_are_noted_with_their_reason(invoice: Callable[..., Invoice]) -> None:
    printed = lay_out(
        invoice(
            lines=[
                {"description": "a", "unit_price": "10", "tax": {"rate": "19"}},
                {"description": "b", "unit_price": "5", "tax": {"category": "AE", "rate": "0"}},
                {
                    "description": "c",
                    "unit_price": "7",
                    "tax": {"category": "E", "rate": "0", "exemption_reason": "§ 4 Nr. 21"},
                },
            ]
        )
    )

    assert printed["notes"] == [
        f"Steuerschuldnerschaft des Leistungsempfängers: 5,00{NBSP}€",
        f"Steuerfrei: 7,00{NBSP}€ (§ 4 Nr. 21)",
    ]
    assert [amount for _, amount in printed["sums"]] == [f"22,00{NBSP}€", f"1,90{NBSP}€"]


@pytest.mark.parametrize(
    ("last_line", "address"),
    [
        ("20457 Hamburg", ["Speicherstraße 12", "20457 Hamburg", "Deutschland"]),
        ("20457 Hamburg, Deutschland", ["Speicherstraße 12", "20457 Hamburg, Deutschland"]),
    ],
)
def test_the_country_is_printed_once(invoice: Callable[..., Invoice], last_line: str, address: list[str]) -> None:
    assert lay_out(invoice(buyer={"address": ["Speicherstraße 12", last_line]}))["buyer"]["address"] == address
