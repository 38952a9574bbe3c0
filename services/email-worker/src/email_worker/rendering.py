"""Templates and locales: from facts to the subject, the text part and the HTML part of a mail.

Templates come from this package and never from a message; they run in Jinja's sandbox all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from babel.numbers import format_currency, get_currency_symbol
from jinja2 import PackageLoader, StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from email_worker.phrases import Phrases, phrases_for
from taskmesh import money
from taskmesh.contracts.billing import Money

FIRST_STRONG_ISOLATE = "\u2068"
POP_ISOLATE = "\u2069"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox without `*` and `**`, which its own limits do not cover: `'a' * 10**9` is a gigabyte."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002 - Jinja's signature
        """Refuse.

        Raises:
            SecurityError: Always.
        """
        raise SecurityError(f"templates may not use {operator}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The parts of a mail that a reader sees."""

    language: str
    subject: str
    text: str
    html: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceFacts:
    """What the invoice mail tells."""

    number: str
    amount: Money
    due_on: date
    recipient: str
    sender: str
    filename: str


def render_invoice(facts: InvoiceFacts, locale: str) -> Rendered:
    """The mail that brings an invoice, in the reader's language or in English."""
    phrases = phrases_for(locale)
    formats = _babel_locale(locale, phrases)
    values = {
        "phrases": phrases,
        "number": facts.number,
        "amount": format_money(facts.amount, formats),
        "due_on": format_date(facts.due_on, format="long", locale=formats),
        "recipient": facts.recipient,
        "sender": facts.sender,
        "filename": facts.filename,
    }
    fill = plain_filler(phrases)
    return Rendered(
        language=phrases.language,
        subject=fill(phrases.subject, number=facts.number, sender=facts.sender),
        text=_environment().get_template("invoice.txt.j2").render(**values, fill=fill, isolate=_isolator(phrases)),
        html=_environment().get_template("invoice.html.j2").render(**values, fill=fill_markup),
    )


def format_money(amount: Money, locale: Locale) -> str:
    """The amount as the locale writes it, with the decimals that ISO 4217 gives the currency.

    Babel's own digits follow CLDR, which rounds thirteen currencies to what people hand over in cash.
    """
    exponent = money.exponent(amount.currency)
    pattern = locale.currency_formats["standard"].pattern
    if get_currency_symbol(amount.currency, locale).isalpha():
        # CLDR keeps letters apart from digits, Babel does not: BHD1.000.
        pattern = re.sub("¤(?=[#0])", "¤\N{NO-BREAK SPACE}", pattern)
    return format_currency(
        money.to_major(amount.amount_minor, amount.currency),
        amount.currency,
        format=_with_decimals(pattern, exponent),
        locale=locale,
        currency_digits=False,
    )


def _with_decimals(pattern: str, exponent: int) -> str:
    """A CLDR number pattern with exactly `exponent` decimals: `#,##0.00` becomes `#,##0` for yen."""
    decimals = "." + "0" * exponent if exponent else ""
    return pattern.replace(".00", decimals)


def plain_filler(phrases: Phrases) -> Callable[..., str]:
    """Fills a phrase for a header or the text part.

    In a right-to-left sentence each value is isolated: `INV-2026-7` would otherwise be laid out in pieces.
    """
    isolate = _isolator(phrases)

    def fill(phrase: str, **values: str) -> str:
        return phrase.format(**{name: isolate(value) for name, value in values.items()})

    return fill


def _isolator(phrases: Phrases) -> Callable[[str], str]:
    if phrases.direction == "ltr":
        return str
    return lambda value: f"{FIRST_STRONG_ISOLATE}{value}{POP_ISOLATE}"


def fill_markup(phrase: str, **values: str) -> Markup:
    """Fills a phrase for the HTML part: values are escaped, and isolated from the direction of the sentence."""
    isolated = {name: Markup("<bdi>{}</bdi>").format(value) for name, value in values.items()}
    return Markup(phrase).format(**isolated)  # noqa: S704 - phrases are constants of this package


def _babel_locale(locale: str, phrases: Phrases) -> Locale:
    """How numbers and dates are written: as the reader's country does, if the mail is in the reader's language."""
    if locale.partition("-")[0] == phrases.language:
        try:
            return Locale.parse(locale, sep="-")
        except (UnknownLocaleError, ValueError):
            pass
    return Locale(phrases.language)


@cache
def _environment() -> TemplateEnvironment:
    return TemplateEnvironment(
        loader=PackageLoader("email_worker"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
