"""PDF documents, rendered by the real typst with the real fonts."""

# ruff: noqa: RUF001 - Greek letters are meant where they stand

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfReader

from billing_worker import fonts
from billing_worker.errors import RenderingFailed
from billing_worker.invoices import Invoice
from billing_worker.rendering import Renderer

Build = Callable[..., Invoice]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def pages(document: bytes) -> list[str]:
    return [page.extract_text() for page in PdfReader(io.BytesIO(document)).pages]


def squeezed(text: str) -> str:
    """The text without white space and directional marks."""
    return re.sub(r"[\s\u200b\u200e\u200f\u2066-\u2069]", "", text)


def test_a_document_says_what_was_sold_to_whom_for_how_much(renderer: Renderer, invoice: Build) -> None:
    (page,) = pages(renderer.render(invoice(buyer_reference="PO-4711", supply_date="2026-02-28")))

    for printed in (
        "Taskmesh Demo GmbH",
        "DE123456789",
        "Nordwind Handels GmbH",
        "INV-2026-000123",
        "14. März 2026",
        "28. Februar 2026",
        "28. März 2026",
        "PO-4711",
        "Beratung",
        "DE89 3704 0044 0532 0130 00",
        "Seite 1 von 1",
    ):
        assert squeezed(printed) in squeezed(page)
    assert all(amount in squeezed(page) for amount in ("100,00€", "19,00€", "119,00€"))


@pytest.mark.parametrize(
    ("locale", "name", "currency", "printed"),
    [
        ("ja-JP", "株式会社さくら商事", "JPY", ["請求書", "￥119"]),
        ("el", "Αφοί Παπαδόπουλοι Α.Ε.", "EUR", ["Τιμολόγιο", "119,00€"]),
        ("fr", "Café de l’Œuvre", "EUR", ["Facture", "119,00€"]),
        ("en", "Łukasz Żółć & Søn", "EUR", ["Invoice", "€119.00"]),
        ("sv", "Владимир Петров", "EUR", ["Invoice", "€119.00"]),
    ],
)
def test_names_of_many_scripts_are_readable(
    renderer: Renderer,
    invoice: Build,
    caplog: pytest.LogCaptureFixture,
    locale: str,
    name: str,
    currency: str,
    printed: list[str],
) -> None:
    (page,) = pages(renderer.render(invoice(currency=currency, buyer={"name": name, "locale": locale})))

    assert squeezed(name) in squeezed(page)
    assert all(text in squeezed(page) for text in printed)
    assert not caplog.records


def test_arabic_is_shaped_and_numbers_keep_their_order(
    renderer: Renderer, invoice: Build, caplog: pytest.LogCaptureFixture
) -> None:
    document = renderer.render(
        invoice(
            currency="BHD",
            buyer={"name": "شركة الخليج للتجارة", "locale": "ar-BH"},
            lines=[{"description": "خدمات", "unit_price": "1249.995", "tax": {"rate": "10"}}],
        )
    )

    (page,) = pages(document)
    assert "1,249.995" in squeezed(page)
    assert "1,374.995" in squeezed(page)
    assert "INV-2026-000123" in squeezed(page)
    assert "شركة الخليج للتجارة" in page
    assert not caplog.records


def test_300_lines_repeat_the_header_and_count_the_pages(renderer: Renderer, invoice: Build) -> None:
    lines = [
        {"description": f"Posten {number}", "unit_price": f"{number}.01", "tax": {"rate": "19"}}
        for number in range(1, 301)
    ]

    printed = pages(renderer.render(invoice(lines=lines)))

    assert len(printed) > 5
    for number, page in enumerate(printed, start=1):
        assert "Beschreibung" in page or "Posten" not in page
        assert f"Seite {number} von {len(printed)}" in page
    found = [int(number) for page in printed for number in re.findall(r"Posten\s+(\d+)", page)]
    assert found == list(range(1, 301))
    assert "Gesamtbetrag" in printed[-1]


def test_words_without_a_break_stay_on_the_page(renderer: Renderer, invoice: Build) -> None:
    document = renderer.render(
        invoice(
            buyer={"name": "N" * 200, "address": ["A" * 200]},
            buyer_reference="R" * 100,
            lines=[{"description": "https://example.com/" + "q" * 480, "unit_price": "1", "tax": {"rate": "19"}}],
        )
    )

    longest = {letter: max(map(len, re.findall(letter + "+", pages(document)[0]))) for letter in "NARq"}
    assert longest["q"] < 60
    assert longest["N"] < 40
    assert longest["A"] < 60
    assert longest["R"] < 40


def test_data_is_printed_and_never_run(renderer: Renderer, invoice: Build) -> None:
    text = '#panic("x") *b* #read("/etc/passwd") $1$ \\ "quoted"'

    (page,) = pages(renderer.render(invoice(lines=[{"description": text, "unit_price": "1", "tax": {"rate": "19"}}])))

    assert squeezed(text) in squeezed(page)


def digest(sender: Any, invoice: Invoice) -> None:
    sender.send(hashlib.sha256(Renderer().render(invoice)).hexdigest())


def test_the_same_invoice_gives_the_same_bytes_in_another_process(renderer: Renderer, invoice: Build) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    first = renderer.render(invoice())

    child = multiprocessing.get_context("spawn").Process(target=digest, args=(sender, invoice()))
    child.start()
    elsewhere = receiver.recv()
    child.join()

    assert first == renderer.render(invoice())
    assert elsewhere == hashlib.sha256(first).hexdigest()
    assert first != renderer.render(invoice(due_days=14, buyer={"name": "Other"}))


def refuse(sender: Any, renderer: Renderer, invoice: Invoice) -> None:
    try:
        renderer.render(invoice)
    except RuntimeError as error:
        sender.send(str(error))


def test_a_renderer_refuses_to_work_in_a_forked_child_where_it_would_hang(invoice: Build) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)

    child = multiprocessing.get_context("fork").Process(target=refuse, args=(sender, Renderer(), invoice()))
    child.start()

    assert receiver.poll(20)
    assert "fork" in receiver.recv()
    child.join()


def test_the_document_is_a_pdf_a_with_a_title_and_only_embedded_fonts(renderer: Renderer, invoice: Build) -> None:
    document = renderer.render(invoice())

    reader = PdfReader(io.BytesIO(document))
    assert reader.metadata is not None
    assert reader.metadata.title == "Rechnung INV-2026-000123"
    assert b"pdfaid" in document or "pdfaid" in reader.xmp_metadata.stream.get_data().decode()  # type: ignore[union-attr]


def test_characters_without_a_glyph_are_logged_and_replaced(
    renderer: Renderer, invoice: Build, caplog: pytest.LogCaptureFixture
) -> None:
    (page,) = pages(renderer.render(invoice(buyer={"name": 'Bäckerei 🎉 "ไทย"'})))

    assert 'Bäckerei□"□□□"' in squeezed(page)
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "glyphs missing")
    assert record.__dict__["characters"] == ["U+0E17", "U+0E22", "U+0E44", "U+1F389"]


PRINTABLE = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc"],
        exclude_characters="\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    ),
    min_size=1,
    max_size=40,
).filter(str.strip)


@given(name=PRINTABLE, description=PRINTABLE, locale=st.sampled_from(["en", "ar", "ja"]))
@settings(max_examples=40, deadline=None)
def test_whatever_the_contract_lets_in_is_rendered(
    renderer: Renderer, invoice: Build, name: str, description: str, locale: str
) -> None:
    line = {"description": description, "unit_price": "1", "tax": {"rate": "19"}}

    document = renderer.render(invoice(buyer={"name": name, "locale": locale}, lines=[line]))

    assert document.startswith(b"%PDF-")


def test_missing_fonts_are_said_and_fail_the_document(
    invoice: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "_PACKAGES", (("Noto Sans", "no_such_package", "files"),))

    with pytest.raises(RenderingFailed):
        Renderer().render(invoice())

    assert caplog.records[0].message == "font missing"
    assert caplog.records[0].__dict__["font_package"] == "no_such_package"
