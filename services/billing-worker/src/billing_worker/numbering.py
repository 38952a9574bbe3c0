"""Invoice numbers: sequential without a gap within a series, as tax authorities ask.

A PostgreSQL sequence would leave a gap for every transaction that rolls back. Here a number is the value of a counter
row, raised in the transaction that issues the invoice: a rollback gives it back. The row stays locked until that
transaction ends, so take the number last.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

# One statement, so that year, number and time agree. The time is the clock's at the moment the lock is ours: now()
# would be the transaction's start, and dates could then run against the numbers. Whoever waited for the lock across
# midnight of New Year's Eve keeps the year that the series was chosen for.
_TAKE = text(
    """
    with chosen as materialized (
      select extract(year from clock_timestamp() at time zone 'UTC')::int as year
    )
    insert into invoice_counters as counter (series, last)
    select :seller || ':' || :kind || ':' || year, 1 from chosen
    on conflict (series) do update set last = counter.last + 1
    returning series, last, (select year from chosen) as year,
      least(
        clock_timestamp(),
        make_timestamptz((select year from chosen) + 1, 1, 1, 0, 0, 0, 'UTC') - interval '1 microsecond'
      ) as issued_at
    """
)


@dataclass(frozen=True, slots=True)
class InvoiceNumber:
    """A number that is taken once the caller's transaction commits."""

    series: str
    sequence: int
    number: str
    """What is printed: `INV-2026-000123`."""
    issued_at: datetime
    """Never earlier than that of a lower number of the series."""


def take_number(session: Session, *, seller: str, kind: str = "INV") -> InvoiceNumber:
    """Take the next number of the seller's series of this year, holding the series until the caller commits.

    Args:
        session: Its transaction is the one that issues the invoice; do everything else in it first.
        seller: The legal entity, by its VAT id: each numbers its own invoices.
        kind: The kind of document: invoices and credit notes are numbered apart.
    """
    row = session.execute(_TAKE, {"seller": seller, "kind": kind}).one()
    return InvoiceNumber(row.series, row.last, f"{kind}-{row.year}-{row.last:06d}", row.issued_at)
