"""The ledger, and what the database refuses whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from billing_worker import invoices, postings
from billing_worker.postings import Account, Entry
from billing_worker.settings import Seller
from taskmesh.contracts.billing import IssueInvoice

BALANCED = [Entry(Account.RECEIVABLE, 119), Entry(Account.REVENUE, -100), Entry(Account.VAT_PAYABLE, -19)]

ADD_TO_POSTED = """
    insert into ledger_entries (transaction_id, account, currency, amount_minor)
    select id, 'revenue', 'EUR', unnest(array[-5, 5]) from ledger_transactions
"""


def sqlstate(error: DBAPIError) -> Any:
    return getattr(error.orig, "sqlstate", None)


def test_an_invoice_is_posted_as_owed_earned_and_taxed(
    sessions: sessionmaker[Session], command: Callable[..., IssueInvoice], seller: Seller
) -> None:
    with sessions.begin() as session:
        invoices.issue(session, command(), idempotency_key="a", seller=seller)
        invoices.issue(session, command(currency="JPY"), idempotency_key="b", seller=seller)

    with sessions() as session:
        balances = postings.list_balances(session)
    assert balances == {
        ("receivable", "EUR"): 11900,
        ("revenue", "EUR"): -10000,
        ("vat_payable", "EUR"): -1900,
        ("receivable", "JPY"): 119,
        ("revenue", "JPY"): -100,
        ("vat_payable", "JPY"): -19,
    }


@pytest.mark.parametrize(
    "entries",
    [
        [Entry(Account.RECEIVABLE, 119), Entry(Account.REVENUE, -100)],
        [Entry(Account.RECEIVABLE, 1), Entry(Account.REVENUE, 1)],
    ],
)
def test_a_transaction_that_does_not_balance_does_not_commit(
    sessions: sessionmaker[Session], entries: list[Entry]
) -> None:
    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        postings.post(session, "invoice", uuid4(), entries, "EUR")

    assert sqlstate(caught.value) == "23514"


def test_a_balance_across_currencies_is_none(sessions: sessionmaker[Session]) -> None:
    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        postings.post(session, "invoice", uuid4(), BALANCED, "EUR")
        session.execute(
            text("insert into ledger_transactions (id, kind, source_id, entry_count) values (:id, 'x', :id, 2)"),
            {"id": (id_ := uuid4())},
        )
        session.execute(
            text(
                "insert into ledger_entries (transaction_id, account, currency, amount_minor) values (:id, 'receivable', 'EUR', 1), (:id, 'revenue', 'USD', -1)"
            ),
            {"id": id_},
        )

    assert sqlstate(caught.value) == "23514"


def test_a_transaction_without_entries_does_not_commit(sessions: sessionmaker[Session]) -> None:
    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        session.execute(
            text("insert into ledger_transactions (id, kind, source_id, entry_count) values (:id, 'invoice', :id, 2)"),
            {"id": uuid4()},
        )

    assert sqlstate(caught.value) == "23514"


def test_one_source_is_posted_once(sessions: sessionmaker[Session]) -> None:
    source = uuid4()
    with sessions.begin() as session:
        postings.post(session, "invoice", source, BALANCED, "EUR")

    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        postings.post(session, "invoice", source, BALANCED, "EUR")

    assert sqlstate(caught.value) == "23505"


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("update ledger_entries set amount_minor = amount_minor * 2", "0A000"),
        ("update ledger_entries set account = 'revenue'", "0A000"),
        ("delete from ledger_entries", "0A000"),
        ("update ledger_transactions set kind = 'refund'", "0A000"),
        ("delete from ledger_transactions", "0A000"),
        ("truncate ledger_entries, ledger_transactions", "0A000"),
        (ADD_TO_POSTED, "23514"),
    ],
)
def test_what_is_posted_stays_as_it_is(sessions: sessionmaker[Session], change: str, state: str) -> None:
    with sessions.begin() as session:
        postings.post(session, "invoice", uuid4(), BALANCED, "EUR")

    with pytest.raises(DBAPIError) as caught, sessions.begin() as session:
        session.execute(text(change))

    assert sqlstate(caught.value) == state
