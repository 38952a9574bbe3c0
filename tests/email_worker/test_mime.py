"""Mails as bytes: nothing gets into a header that was not put there, and the same input gives the same bytes."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.headerregistry import Address
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from email_worker import mime
from email_worker.addresses import BadAddress, UnsafeHeader, is_header_safe, parse_address
from email_worker.composing import message_mail
from taskmesh.contracts.email import SendMessage

HEADERS = [
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "Auto-Submitted",
    "MIME-Version",
    "Content-Type",
    "Content-Transfer-Encoding",
]
EVIL = [
    "\r\nBcc: evil@x.test",
    "\nBcc: e@x",
    "\r",
    "=?utf-8?q?x=0D=0ABcc=3A_evil=40x.test?=",
    "=?utf-8?b?DQpCY2M6IGU=?=",
    "\u2028",
    "\x85",
    "\x00",
    '"',
    "<e@x>",
    ",",
    ";",
    "=?",
    "?=",
]


def heading(**fields) -> mime.Heading:
    defaults = {
        "message_id": UUID("019a0000-0000-7000-8000-000000000001"),
        "template": "message",
        "domain": "mail.example.com",
        "created_at": datetime(2026, 11, 22, 10, 30, tzinfo=UTC),
        "sender": Address("Example Ltd", "billing", "example.com"),
        "recipient": Address("Anna", "anna", "example.org"),
        "subject": "Hello",
    }
    return mime.Heading(**(defaults | fields))


def build(*, text="Hello.", html=None, files=(), **fields) -> bytes:
    return mime.build(heading(**fields), text=text, html=html, files=files)


def pdf(content=b"%PDF", filename="a.pdf", media_type="application/pdf") -> mime.File:
    return mime.File(filename=filename, media_type=media_type, content=content)


texts = st.lists(st.one_of(st.sampled_from(EVIL), st.text(max_size=40)), max_size=5).map("".join)


@given(subject=texts, name=texts, filename=texts, body=texts)
def test_no_text_of_a_caller_adds_or_changes_a_header(subject, name, filename, body):
    command = SendMessage.model_construct(
        to=SendMessage.model_fields["to"].annotation.model_construct(address="anna@example.org", name=name),
        subject=subject, text=body, html=None, attachments=(),
    )  # fmt: skip

    try:
        mail = message_mail(command)
        wire = build(text=body or " ", recipient=mail.recipient, subject=mail.subject, files=[pdf(filename=filename)])
    except UnsafeHeader:
        assert not (is_header_safe(subject) and is_header_safe(name))
        return

    seen = message_from_bytes(wire, policy=policy.default)
    assert sorted(seen.keys()) == sorted(HEADERS[:-1])
    assert str(seen["Subject"]) == " ".join(subject.split())
    assert [address.addr_spec for address in seen["To"].addresses] == ["anna@example.org"]
    assert len(list(seen.iter_attachments())) == 1
    assert wire.isascii()
    assert b"\n" not in wire.replace(b"\r\n", b"")


@pytest.mark.parametrize("text", [text for text in EVIL if not is_header_safe(text)] + ["a\u202eb", "=?utf-8?q?a?="])
def test_text_that_is_not_fit_for_a_header_is_refused(text):
    with pytest.raises(UnsafeHeader):
        build(subject=f"Hello {text}")


@pytest.mark.parametrize(
    "name",
    [
        "Doe, John",
        'Anna "A" (b) <c@d>',
        "株式会社サンプル 東京支店",
        "شركة المثال",
        "Ünïcode " * 20 + "x",
        "Long Company Name " * 9 + "x",
    ],
)
def test_any_name_is_read_back_beside_its_address(name):
    name = " ".join(name.split())

    wire = build(recipient=Address(name, addr_spec="anna@example.org"), subject=name)

    seen = message_from_bytes(wire, policy=policy.default)
    assert str(seen["Subject"]) == name
    assert [address.addr_spec for address in seen["To"].addresses] == ["anna@example.org"]


def test_the_same_input_gives_the_same_bytes():
    random.seed(1)
    first = build(text="Grüße", html="<p>Grüße</p>", files=[pdf()], language="de")
    random.seed(2)
    second = build(text="Grüße", html="<p>Grüße</p>", files=[pdf()], language="de")

    assert first == second
    assert b"Date: Sun, 22 Nov 2026 10:30:00 +0000\r\n" in first
    assert b"Message-ID: <019a0000-0000-7000-8000-000000000001.message@mail.example.com>\r\n" in first


def test_a_mail_is_nested_as_clients_expect():
    seen = message_from_bytes(build(html="<p>Hi</p>", files=[pdf()]), policy=policy.default)

    assert [part.get_content_type() for part in seen.walk()] == [
        "multipart/mixed", "multipart/alternative", "text/plain", "text/html", "application/pdf",
    ]  # fmt: skip


def test_a_text_cannot_hold_a_boundary():
    boundary = f"--=_{heading().message_id.hex}_alternative"
    text = f"\n{boundary}\nContent-Type: text/html\n\n<b>evil</b>\n{boundary}--\n"

    seen = message_from_bytes(build(text=text, html="<p>Hi</p>"), policy=policy.default)

    assert [part.get_content_type() for part in seen.walk()] == ["multipart/alternative", "text/plain", "text/html"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("請求書 2026-1.pdf", "請求書 2026-1.pdf"),
        ("../../etc/passwd", "etc_passwd"),
        ('a"b\r\nX: y.pdf', "a_b_X_ y.pdf"),
        ("C:\\temp\\x.exe.", "C_temp_x.exe"),
        (".htaccess", "htaccess"),
        ("///", "attachment"),
        ("x" * 200 + ".pdf", "x" * 96 + ".pdf"),
        ("invoice\u202efdp.exe", "invoice_fdp.exe"),
    ],
)
def test_a_filename_is_reduced_to_a_name(name, safe):
    assert mime.safe_filename(name) == safe


def test_what_is_too_large_or_of_a_wrong_type_is_refused():
    large = pdf(b"x" * (mime.ATTACHMENT_MAX_BYTES + 1))
    sizable = pdf(b"x" * mime.ATTACHMENT_MAX_BYTES)

    for refused in ({"files": [large]}, {"files": [sizable, sizable]}, {"html": "x" * 100_001}):
        with pytest.raises(mime.MailTooBig):
            build(**refused)
    with pytest.raises(mime.MediaTypeRefused):
        build(files=[pdf(media_type="message/rfc822")])
    assert len(build(files=[sizable])) < mime.MAIL_MAX_BYTES


def test_a_text_attachment_keeps_its_line_ends():
    content = b"a,b\n1,2\r\n\r3"

    seen = message_from_bytes(build(files=[pdf(content, "a.csv", "text/csv")]), policy=policy.default)

    (part,) = seen.iter_attachments()
    assert part.get_payload(decode=True) == content


def test_an_international_domain_is_sent_as_punycode_and_other_letters_are_refused():
    assert parse_address("anna@bücher.example") == "anna@xn--bcher-kva.example"
    for address in ("änna@example.org", "a@b@c", "anna@", "a b@example.org"):
        with pytest.raises(BadAddress) as error:
            parse_address(address)
        assert address not in str(error.value)
