"""The invoice mail: languages, money, and values that are not markup."""

from __future__ import annotations

import re
from datetime import date

import pytest
from babel import Locale
from jinja2 import StrictUndefined, UndefinedError
from jinja2.exceptions import SecurityError

from email_worker.composing import invoice_mail
from email_worker.phrases import PHRASES
from email_worker.rendering import InvoiceFacts, TemplateEnvironment, format_money, render_invoice
from taskmesh.contracts.billing import DocumentReady, Money


def facts(**fields) -> InvoiceFacts:
    defaults = {
        "number": "2026-000123",
        "amount": Money(amount_minor=123456, currency="EUR"),
        "due_on": date(2026, 12, 6),
        "recipient": "Anna Smith",
        "sender": "Example Ltd",
        "filename": "invoice.pdf",
    }
    return InvoiceFacts(**(defaults | fields))


@pytest.mark.parametrize(
    ("locale", "subject", "amount", "due"),
    [
        ("en", "Invoice 2026-000123 from Example Ltd", "€1,234.56", "December 6, 2026"),
        ("de-AT", "Rechnung 2026-000123 von Example Ltd", "€\xa01.234,56", "6. Dezember 2026"),
        ("fr", "Facture 2026-000123 de Example Ltd", "1\u202f234,56\xa0€", "6 décembre 2026"),
        ("el", "Τιμολόγιο 2026-000123 από Example Ltd", "1.234,56\xa0€", "6 Δεκεμβρίου 2026"),
        ("ja", "【Example Ltd】請求書 2026-000123 のご案内", "€1,234.56", "2026年12月6日"),
        ("ar", "الفاتورة \u20682026-000123\u2069 من \u2068Example Ltd\u2069", "1,234.56\xa0€", "6 ديسمبر 2026"),
        ("pt-BR", "Invoice 2026-000123 from Example Ltd", "€1,234.56", "December 6, 2026"),
        ("de-ZZ", "Rechnung 2026-000123 von Example Ltd", "1.234,56\xa0€", "6. Dezember 2026"),
    ],
)
def test_the_mail_speaks_the_readers_language_or_english(locale, subject, amount, due):
    rendered = render_invoice(facts(), locale)

    assert rendered.subject == subject
    for part in (rendered.text, rendered.html):
        assert amount in part
        assert due in part
        assert "2026-000123" in part


@pytest.mark.parametrize(
    ("amount_minor", "currency", "shown"),
    [
        (1000, "JPY", "¥1,000"),
        (1000, "BHD", "BHD\xa01.000"),
        (100050, "LBP", "LBP\xa01,000.50"),
        (12345, "ISK", "ISK\xa012,345"),
        (-1, "EUR", "-€0.01"),
        (2**53 - 1, "EUR", "€90,071,992,547,409.91"),
    ],
)
def test_amounts_have_the_decimals_of_iso_4217(amount_minor, currency, shown):
    assert format_money(Money(amount_minor=amount_minor, currency=currency), Locale("en")) == shown


@pytest.mark.parametrize("language", sorted(PHRASES))
def test_html_stays_small_and_asks_nobody_for_anything(language):
    html = render_invoice(facts(recipient="x" * 200), language).html

    assert len(html.encode()) < 100_000
    assert not re.search(r"https?:|url\(|<script|<img|<link", html)
    assert f'dir="{PHRASES[language].direction}"' in html


def test_values_are_escaped_in_html_and_plain_in_text():
    rendered = render_invoice(facts(recipient="<b>Söhne & {{ 7*7 }} {number}</b>"), "en")

    assert "&lt;b&gt;Söhne &amp; {{ 7*7 }} {number}&lt;/b&gt;" in rendered.html
    assert "<b>Söhne & {{ 7*7 }} {number}</b>" in rendered.text


def test_the_sandbox_refuses_what_could_run_away():
    environment = TemplateEnvironment(undefined=StrictUndefined)

    for source in ("{{ 'a' * 10**9 }}", "{{ 2 ** 9999 }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(SecurityError):
            environment.from_string(source).render()
    with pytest.raises(UndefinedError):
        environment.from_string("{{ missing }}").render()


def test_a_strange_name_does_not_keep_an_invoice_from_its_reader(payload_factory):
    payload = payload_factory(
        DocumentReady,
        recipient_name="=?utf-8?q?x=0D=0ABcc=3A?=",
        recipient_email="anna@example.org",
        locale="en",
        total={"amount_minor": 100, "currency": "EUR"},
        invoice_number="2026-1",
    )

    mail = invoice_mail(DocumentReady.model_validate(payload), sender_name="Example Ltd")

    assert mail.recipient.display_name == ""
    assert mail.subject == "Invoice 2026-1 from Example Ltd"
