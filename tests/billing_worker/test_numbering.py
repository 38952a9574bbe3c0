"""Numbers without gaps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from billing_worker import invoices
from billing_worker.numbering import take_number
from billing_worker.settings import Seller
from taskmesh.contracts.billing import IssueInvoice


class Abandoned(Exception):
    """Raised to roll a transaction back."""


def test_eight_threads_with_rollbacks_leave_no_gap_and_dates_follow_numbers(
    sessions: sessionmaker[Session], command: Callable[..., IssueInvoice], seller: Seller
) -> None:
    def issue(turn: int) -> None:
        try:
            with sessions.begin() as session:
                invoices.issue(session, command(), idempotency_key=str(uuid4()), seller=seller)
                if turn % 5 == 0:
                    raise Abandoned
        except Abandoned:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(issue, range(200)))

    with sessions() as session:
        rows = session.execute(text("select sequence, issued_at from invoices order by sequence")).all()
    assert [row.sequence for row in rows] == list(range(1, 161))
    assert [row.issued_at for row in rows] == sorted(row.issued_at for row in rows)


def test_each_seller_and_kind_has_its_own_series(sessions: sessionmaker[Session]) -> None:
    with sessions.begin() as session:
        taken = [
            take_number(session, seller="DE1"),
            take_number(session, seller="DE2"),
            take_number(session, seller="DE1", kind="CRN"),
            take_number(session, seller="DE1"),
        ]

    year = taken[0].issued_at.year
    assert [(item.series, item.number) for item in taken] == [
        (f"DE1:INV:{year}", f"INV-{year}-000001"),
        (f"DE2:INV:{year}", f"INV-{year}-000001"),
        (f"DE1:CRN:{year}", f"CRN-{year}-000001"),
        (f"DE1:INV:{year}", f"INV-{year}-000002"),
    ]
