"""Issuing: once, in one transaction, and for good."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from billing_worker import invoices
from billing_worker.errors import IdempotencyMismatch, InvoiceUnknown, TotalNegative
from billing_worker.invoices import IssuedInvoice
from billing_worker.settings import Seller
from billing_worker.tables import invoices as table
from taskmesh.contracts.billing import IssueInvoice

Command = Callable[..., IssueInvoice]


@pytest.fixture
def issue(sessions: sessionmaker[Session], seller: Seller) -> Callable[..., IssuedInvoice]:
    """Issue and commit."""

    def run(command: IssueInvoice, key: str | None = None, *, tenant: str = "") -> IssuedInvoice:
        with sessions.begin() as session:
            return invoices.issue(session, command, idempotency_key=key or str(uuid4()), seller=seller, tenant=tenant)

    return run


def test_an_issued_invoice_is_read_back_as_it_was_asked_for(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command, seller: Seller
) -> None:
    wanted = command(
        buyer={"name": "株式会社さくら商事", "vat_id": "T1234567890123"},
        supply_date="2026-02-28",
        buyer_reference="PO-1",
        lines=[
            {"description": "a\nb", "quantity": "0.5", "unit_price": "3.30", "tax": {"rate": "7.00"}},
            {"description": "c", "unit_price": "10", "tax": {"category": "E", "rate": "0", "exemption_reason": "law"}},
        ],
    )

    issued = issue(wanted)

    with sessions() as session:
        kept = invoices.get_invoice(session, issued.invoice_id)
    assert kept.buyer.model_dump(mode="json") == wanted.buyer.model_dump(mode="json")
    assert kept.seller == seller
    assert [(line.description, str(line.quantity), str(line.unit_price), line.net_minor) for line in kept.lines] == [
        ("a\nb", "0.5", "3.30", 165),
        ("c", "1", "10", 1000),
    ]
    assert (kept.net_minor, kept.tax_minor, kept.total_minor) == (1165, 12, 1177)
    assert [group.exemption_reason for group in kept.tax_groups] == [None, "law"]
    assert kept.due_on == kept.issued_on + timedelta(days=14)
    assert kept.number == issued.number == f"INV-{kept.issued_on.year}-000001"
    assert issued.total.amount_minor == 1177


def test_the_same_key_and_content_give_the_same_invoice(issue: Callable[..., IssuedInvoice], command: Command) -> None:
    first = issue(command(), "order-1")
    second = issue(command(idempotency_key="another name for the same wish"), "order-1")

    assert (first.replayed, second.replayed) == (False, True)
    assert second.invoice_id == first.invoice_id
    assert second.event() == first.event()


def test_the_same_key_with_other_content_is_refused(issue: Callable[..., IssuedInvoice], command: Command) -> None:
    first = issue(command(), "order-1")

    with pytest.raises(IdempotencyMismatch, match=first.number) as caught:
        issue(command(due_days=30), "order-1")

    assert caught.value.code == "idempotency_mismatch"
    assert issue(command(due_days=30), "order-1", tenant="other").number.endswith("-000002")


def test_one_key_from_eight_threads_at_once_issues_one_invoice(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command
) -> None:
    start = threading.Barrier(8)

    def attempt(_: int) -> IssuedInvoice:
        start.wait()
        return issue(command(), "order-1")

    with ThreadPoolExecutor(8) as pool:
        issued = list(pool.map(attempt, range(8)))

    assert len({item.invoice_id for item in issued}) == 1
    assert sum(not item.replayed for item in issued) == 1
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(table)) == 1


def test_an_invoice_over_nothing_is_paid_at_once(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command
) -> None:
    issued = issue(command(lines=[{"description": "gift", "unit_price": "0", "tax": {"rate": "19"}}]))

    with sessions() as session:
        assert (
            session.execute(text("select status from invoices where id = :id"), {"id": issued.invoice_id}).scalar()
            == "paid"
        )
        assert session.execute(text("select count(*) from ledger_transactions")).scalar() == 0


def test_what_is_refused_leaves_nothing(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command
) -> None:
    with pytest.raises(TotalNegative):
        issue(command(lines=[{"description": "credit", "unit_price": "-1", "tax": {"rate": "19"}}]))

    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(table)) == 0


@pytest.mark.parametrize(
    "change",
    [
        "update invoices set total_minor = 1, net_minor = 1, tax_minor = 0",
        "update invoices set buyer = '{}'",
        "update invoices set number = 'INV-2026-000009'",
        "update invoices set status = 'draft'",
        "delete from invoices",
        "update invoice_lines set net_minor = 0",
        "delete from invoice_lines",
        "insert into invoice_lines select id, 9, 'more', 1, 1, 'S', 19, 100 from invoices",
        "delete from invoice_tax_groups",
        "truncate invoices cascade",
    ],
)
def test_an_issued_invoice_cannot_be_changed(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command, change: str
) -> None:
    issue(command())

    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        session.execute(text(change))

    assert sqlstate(caught.value) == "0A000"


def test_the_status_of_an_issued_invoice_may_move(
    issue: Callable[..., IssuedInvoice], sessions: sessionmaker[Session], command: Command
) -> None:
    issue(command())

    with sessions.begin() as session:
        session.execute(text("update invoices set status = 'paid'"))


def test_an_invoice_that_is_none_is_unknown(sessions: sessionmaker[Session]) -> None:
    with sessions() as session, pytest.raises(InvoiceUnknown):
        invoices.get_invoice(session, uuid4())


def sqlstate(error: DBAPIError) -> Any:
    return getattr(error.orig, "sqlstate", None)
