"""What is printed on an invoice, as text: worded, rounded and localized here, and only placed by typst."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from babel.numbers import format_decimal, format_percent

from billing_worker import labels
from billing_worker.amounts import TaxGroup
from billing_worker.invoices import Invoice
from billing_worker.labels import Labels
from taskmesh.contracts.billing import TaxCategory
from taskmesh.money import exponent, to_major

_TOUCHING = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_IBAN_GROUPS = re.compile(r".{1,4}")


@dataclass(frozen=True, slots=True)
class Language:
    """How a reader reads: words, number formats, direction."""

    locale: Locale
    labels: Labels

    @classmethod
    def of(cls, tag: str) -> Language:
        """The language of a tag such as `de-AT`; English throughout if there are no words for it."""
        try:
            locale = Locale.parse(tag, sep="-")
        except (UnknownLocaleError, ValueError):
            locale = Locale(tag.partition("-")[0]) if labels.for_language(tag.partition("-")[0]) else Locale("en")
        words = labels.for_language(locale.language)
        return cls(locale, words) if words else cls(Locale("en"), labels.ENGLISH)

    def money(self, amount_minor: int, currency: str) -> str:
        """The amount with its currency's sign, and as many decimals as ISO 4217 (not CLDR) gives the currency."""
        pattern = self._with_decimals(self.locale.currency_formats["standard"], exponent(currency))
        text = pattern.apply(to_major(amount_minor, currency), self.locale, currency=currency, currency_digits=False)
        # CLDR's rule, which Babel does not know: a sign of letters does not touch the digits.
        return _TOUCHING.sub("\N{NO-BREAK SPACE}", text)

    def amount(self, amount_minor: int, currency: str) -> str:
        """The amount without the currency."""
        pattern = self._with_decimals(self.locale.decimal_formats[None], exponent(currency))
        return str(pattern.apply(to_major(amount_minor, currency), self.locale))

    def price(self, unit_price: Decimal, currency: str) -> str:
        """A unit price: at least the currency's decimals, and as many as it was given with."""
        plain = _plain(unit_price)
        decimals = max(exponent(currency), -int(plain.as_tuple().exponent))
        return str(self._with_decimals(self.locale.decimal_formats[None], decimals).apply(plain, self.locale))

    def quantity(self, quantity: Decimal) -> str:
        """A quantity with all its decimals."""
        return format_decimal(_plain(quantity), locale=self.locale, decimal_quantization=False)

    def percent(self, rate: Decimal) -> str:
        """A tax rate; 19 reads 19 %."""
        return format_percent(_plain(rate.scaleb(-2)), locale=self.locale, decimal_quantization=False)

    def day(self, value: date) -> str:
        """A date with the month's name, which reads the same everywhere."""
        return format_date(value, format="long", locale=self.locale)

    @staticmethod
    def _with_decimals(pattern: Any, decimals: int) -> Any:  # Babel's NumberPattern, which it leaves untyped
        adjusted = copy.copy(pattern)
        adjusted.frac_prec = (decimals, decimals)
        return adjusted


def _plain(value: Decimal) -> Decimal:
    """The value without trailing zeros, and without an exponent."""
    normal = value.normalize()
    return normal.quantize(Decimal(1)) if int(normal.as_tuple().exponent) > 0 else normal


def lay_out(invoice: Invoice) -> dict[str, Any]:
    """The template's input; see `templates/invoice.typ`. Depends on nothing but the invoice."""
    language = Language.of(invoice.buyer.locale)
    words = language.labels
    currency = invoice.currency
    return {
        "language": language.locale.language,
        "region": language.locale.territory,
        "rtl": language.locale.text_direction == "rtl",
        "title": f"{words.invoice} {invoice.number}",
        "issued": [invoice.issued_on.year, invoice.issued_on.month, invoice.issued_on.day],
        "number": invoice.number,
        "currency": currency,
        "labels": {name: text for name, text in asdict(words).items() if isinstance(text, str)},
        "seller": {
            "name": invoice.seller.name,
            "address": list(invoice.seller.address),
            "vat_id": invoice.seller.vat_id,
            "iban": " ".join(_IBAN_GROUPS.findall(invoice.seller.iban.replace(" ", ""))),
            "email": invoice.seller.email,
        },
        "buyer": {
            "name": invoice.buyer.name,
            "address": [*invoice.buyer.address, *_country(invoice, language)],
            "vat_id": invoice.buyer.vat_id,
        },
        "facts": _facts(invoice, language),
        "lines": [
            {
                "position": str(line.position),
                "description": line.description.split("\n"),
                "quantity": language.quantity(line.quantity),
                "unit_price": language.price(line.unit_price, currency),
                "vat": language.percent(line.tax_rate) if line.tax_category is TaxCategory.STANDARD else "\N{EN DASH}",
                "amount": language.amount(line.net_minor, currency),
            }
            for line in invoice.lines
        ],
        "sums": [
            [words.net_total, language.money(invoice.net_minor, currency)],
            *(
                [
                    words.vat_on.format(
                        rate=language.percent(group.rate), taxable=language.money(group.taxable_minor, currency)
                    ),
                    language.money(group.tax_minor, currency),
                ]
                for group in invoice.tax_groups
                if group.category is TaxCategory.STANDARD
            ),
        ],
        "total": language.money(invoice.total_minor, currency),
        "notes": [_note(group, invoice, language) for group in invoice.tax_groups if _is_untaxed(group)],
        "pay": _pay(invoice, language),
        "owed": invoice.total_minor > 0,
    }


def _country(invoice: Invoice, language: Language) -> list[str]:
    """The country's name in the reader's language, unless the address ends with it."""
    name = language.locale.territories.get(invoice.buyer.country, invoice.buyer.country)
    last = invoice.buyer.address[-1].casefold()
    return [] if name.casefold() in last or last in {"", invoice.buyer.country.casefold()} else [name]


def _facts(invoice: Invoice, language: Language) -> list[list[str]]:
    words = language.labels
    facts = [
        (words.number, invoice.number),
        (words.issued, language.day(invoice.issued_on)),
        (words.supplied, language.day(invoice.supply_date) if invoice.supply_date else None),
        (words.due, language.day(invoice.due_on)),
        (words.reference, invoice.buyer_reference),
    ]
    return [[name, value] for name, value in facts if value]


def _is_untaxed(group: TaxGroup) -> bool:
    return group.category is not TaxCategory.STANDARD


def _note(group: TaxGroup, invoice: Invoice, language: Language) -> str:
    amount = language.money(group.taxable_minor, invoice.currency)
    note = f"{language.labels.untaxed[group.category]}: {amount}"
    return f"{note} ({group.exemption_reason})" if group.exemption_reason else note


def _pay(invoice: Invoice, language: Language) -> str:
    words = language.labels
    if invoice.total_minor == 0:
        return words.nothing_due
    return words.pay.format(
        total=language.money(invoice.total_minor, invoice.currency),
        due=language.day(invoice.due_on),
        number=invoice.number,
    )
