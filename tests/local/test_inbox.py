"""The inbox page: a real SMTP server in front, pages and a JSON API behind."""

from __future__ import annotations

import asyncio
import smtplib
from email.message import EmailMessage

import pytest
from fastapi.testclient import TestClient

from taskmesh_local.inbox import application, smtp_server
from taskmesh_local.mails import Mails


def _mail(subject="Invoice <b>7</b>", to="Ада <ada@example.com>"):
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"], mail["Message-ID"] = "a@example.com", to, subject, "<7@example.com>"
    mail.set_content("Dear Ada")
    mail.add_alternative("<p>Dear <b>Ada</b></p><script>alert(1)</script>", subtype="html")
    mail.add_attachment(b"%PDF-1.7", maintype="application", subtype="pdf", filename="Rechnung Ä.pdf")
    mail.add_attachment(b"<script>alert(1)</script>", maintype="text", subtype="html", filename="page.html")
    return mail


@pytest.fixture
def mails(tmp_path):
    return Mails(tmp_path / "mails.db")


@pytest.fixture
def page(mails):
    return TestClient(application(mails))


@pytest.fixture
async def smtp_port(mails):
    """The inbox's SMTP server on a free port."""
    server = await asyncio.get_running_loop().create_server(lambda: smtp_server(mails), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_mail_sent_over_smtp_is_in_the_list_with_its_attachments(smtp_port, page):
    """Whoever looks at the API sees what a person sees."""

    def send():
        with smtplib.SMTP("127.0.0.1", smtp_port) as client:
            client.send_message(_mail())

    await asyncio.to_thread(send)

    [mail] = page.get("/api/messages").json()["items"]
    assert (mail["subject"], mail["to"], mail["rcpt_to"]) == (
        "Invoice <b>7</b>",
        "Ада <ada@example.com>",
        ["ada@example.com"],
    )
    assert [file["name"] for file in mail["attachments"]] == ["Rechnung Ä.pdf", "page.html"]
    details = page.get(f"/api/messages/{mail['id']}").json()
    assert details["text"].strip() == "Dear Ada"
    assert ["Message-ID", "<7@example.com>"] in details["headers"]


def test_a_mail_is_still_there_after_the_page_was_killed(mails, tmp_path):
    """It was on disk before its sender was told."""
    mails.add("a@example.com", ["b@example.com"], bytes(_mail()))

    assert Mails(tmp_path / "mails.db").count() == 1


def test_a_mails_html_runs_nothing_and_loads_nothing(mails, page):
    """It is shown in a frame without scripts, under a policy of its own; its subject is text."""
    mails.add("a@example.com", ["b@example.com"], bytes(_mail()))

    shown = page.get("/messages/1")
    html = page.get("/messages/1/html")

    assert "Invoice &lt;b&gt;7&lt;/b&gt;" in shown.text
    assert '<iframe sandbox title="The mail as HTML" src="/messages/1/html">' in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert "<b>Ada</b>" in html.text
    assert html.headers["content-security-policy"].endswith("sandbox")


def test_only_a_pdf_is_shown_in_the_browser(mails, page):
    """An attached page would run under our address; it is a download."""
    mails.add("a@example.com", ["b@example.com"], bytes(_mail()))

    pdf, html = (page.get(f"/messages/1/attachments/{index}") for index in (0, 1))

    assert pdf.headers["content-type"] == "application/pdf"
    assert pdf.headers["content-disposition"] == (
        "inline; filename=\"Rechnung _.pdf\"; filename*=UTF-8''Rechnung%20%C3%84.pdf"
    )
    assert html.headers["content-type"] == "application/octet-stream"
    assert html.headers["content-disposition"].startswith("attachment")


def test_the_list_is_searched_and_paged(mails, page):
    """The newest come first; recipients and subjects match whatever their case."""
    for number in range(5):
        mails.add("a@example.com", [f"user{number}@example.com"], bytes(_mail(f"Invoice {number}", "x@example.com")))

    def numbers(query):
        return [mail["id"] for mail in page.get(f"/api/messages?{query}").json()["items"]]

    assert numbers("limit=2") == [5, 4]
    assert numbers("limit=2&before=4") == [3, 2]
    assert numbers("to=USER3@") == [4]
    assert numbers("subject=invoice%200") == [1]
    assert "No mail matches" in page.get("/?subject=none").text
    assert page.delete("/api/messages").status_code == 204
    assert page.get("/api/messages").json() == {"total": 0, "items": []}


def test_a_mail_without_html_or_attachments_is_shown(mails, page):
    """The least that SMTP lets through: not even a header."""
    mails.add("", ["b@example.com"], b"hello")

    assert "(no subject)" in page.get("/messages/1").text
    assert page.get("/messages/2").status_code == 404


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("=?utf-8?b?2LAu2YU=?=\r\n =?utf-8?b?LtmFLg==?= <a@example.org>", '"ذ.م.م." <a@example.org>'),
        ("=?utf-8?q?Doe=2C_J=C3=B6rg?= <a@example.org>, b@example.org", '"Doe, Jörg" <a@example.org>, b@example.org'),
        ("=?nowhere?q?x?= <a@example.org>", "=?nowhere?q?x?= <a@example.org>"),
        ("undisclosed-recipients:;", "undisclosed-recipients:;"),
    ],
)
def test_names_are_shown_as_they_were_meant(mails, page, header, shown):
    """However a header was folded and encoded, the page says the name that the sender gave."""
    mails.add("from@example.org", ["a@example.org"], f"To: {header}\r\nSubject: x\r\n\r\nx\r\n".encode())

    [mail] = page.get("/api/messages").json()["items"]
    assert mail["to"] == shown
    assert page.get("/").status_code == page.get(f"/messages/{mail['id']}").status_code == 200
