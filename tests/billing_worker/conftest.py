from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from billing_worker import amounts
from billing_worker.__main__ import SCRIPTS
from billing_worker.invoices import Invoice, Line
from billing_worker.settings import Seller
from taskmesh.contracts.billing import IssueInvoice
from taskmesh.database import migrate, sync_engine


@pytest.fixture(scope="session")
def seller() -> Seller:
    return Seller(
        name="Taskmesh Demo GmbH",
        address=("Lindenstraße 7", "10969 Berlin"),
        vat_id="DE123456789",
        iban="DE89370400440532013000",
        email="billing@taskmesh.example",
    )


@pytest.fixture(scope="session")
def command() -> Callable[..., IssueInvoice]:
    """Call it for a valid command; keyword arguments replace fields, `buyer` single fields of the buyer."""

    def build(*, buyer: dict[str, Any] | None = None, **fields: Any) -> IssueInvoice:
        payload: dict[str, Any] = {
            "buyer": {
                "name": "Nordwind Handels GmbH",
                "address": ["Speicherstraße 12", "20457 Hamburg"],
                "country": "DE",
                "email": "rechnung@nordwind.example",
                "locale": "de-DE",
                **(buyer or {}),
            },
            "currency": "EUR",
            "lines": [{"description": "Beratung", "quantity": "2", "unit_price": "50.00", "tax": {"rate": "19"}}],
            **fields,
        }
        return IssueInvoice.model_validate(payload)

    return build


@pytest.fixture(scope="session")
def invoice(command: Callable[..., IssueInvoice], seller: Seller) -> Callable[..., Invoice]:
    """Call it for an issued invoice that no database has seen; takes what `command` takes."""

    def build(**fields: Any) -> Invoice:
        wanted = command(**fields)
        sums = amounts.calculate(wanted.lines, wanted.currency)
        return Invoice(
            id=UUID(int=1),
            number="INV-2026-000123",
            currency=wanted.currency,
            seller=seller,
            buyer=wanted.buyer,
            buyer_reference=wanted.buyer_reference,
            supply_date=wanted.supply_date,
            issued_at=datetime(2026, 3, 14, 10, tzinfo=UTC),
            issued_on=date(2026, 3, 14),
            due_on=date(2026, 3, 28),
            net_minor=sums.net_minor,
            tax_minor=sums.tax_minor,
            total_minor=sums.total_minor,
            lines=tuple(
                Line(
                    position=position,
                    description=line.description,
                    quantity=Decimal(line.quantity),
                    unit_price=Decimal(line.unit_price),
                    tax_category=line.tax.category,
                    tax_rate=Decimal(line.tax.rate),
                    net_minor=net_minor,
                )
                for position, (line, net_minor) in enumerate(
                    zip(wanted.lines, sums.line_nets_minor, strict=True), start=1
                )
            ),
            tax_groups=sums.tax_groups,
        )

    return build


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database of billing's."""
    migrate(database_url, scripts=SCRIPTS)
    engine = sync_engine(database_url, pool_size=10)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)
