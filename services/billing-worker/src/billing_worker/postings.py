"""The double-entry ledger: what was earned, owed and collected for the state.

Debits are positive, credits negative, and each transaction sums to zero per currency. Entries are only ever added;
a mistake is corrected by a transaction that reverses it. The database refuses anything else (see the migrations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID, uuid4

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from billing_worker.amounts import Amounts
from billing_worker.tables import ledger_entries, ledger_transactions


class Account(StrEnum):
    RECEIVABLE = "receivable"
    REVENUE = "revenue"
    VAT_PAYABLE = "vat_payable"


@dataclass(frozen=True, slots=True)
class Entry:
    """One side of a transaction: positive debits the account, negative credits it."""

    account: Account
    amount_minor: int


def post_invoice(session: Session, invoice_id: UUID, amounts: Amounts, currency: str) -> None:
    """Post an invoice: the customer owes the total; the net is earned, and the tax is owed on.

    An invoice over nothing at all leaves nothing to post.
    """
    entries = [
        Entry(Account.RECEIVABLE, amounts.total_minor),
        Entry(Account.REVENUE, -amounts.net_minor),
        Entry(Account.VAT_PAYABLE, -amounts.tax_minor),
    ]
    moving = [entry for entry in entries if entry.amount_minor]
    if moving:
        post(session, "invoice", invoice_id, moving, currency)


def post(session: Session, kind: str, source_id: UUID, entries: Sequence[Entry], currency: str) -> None:
    """Add one transaction, once for each kind and source; whether it balances is judged when the caller commits."""
    transaction_id = uuid4()
    session.execute(
        insert(ledger_transactions),
        {"id": transaction_id, "kind": kind, "source_id": source_id, "entry_count": len(entries)},
    )
    session.execute(
        insert(ledger_entries),
        [
            {
                "transaction_id": transaction_id,
                "account": entry.account.value,
                "currency": currency,
                "amount_minor": entry.amount_minor,
            }
            for entry in entries
        ],
    )


def list_balances(session: Session) -> dict[tuple[str, str], int]:
    """The balance of each account by (account, currency), in minor units; per currency they sum to zero."""
    rows = session.execute(
        select(ledger_entries.c.account, ledger_entries.c.currency, func.sum(ledger_entries.c.amount_minor))
        .group_by(ledger_entries.c.account, ledger_entries.c.currency)
        .order_by(ledger_entries.c.currency, ledger_entries.c.account)
    )
    return {(account, currency): int(balance) for account, currency, balance in rows}
