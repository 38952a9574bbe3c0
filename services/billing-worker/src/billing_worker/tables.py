"""Billing's tables. Constraints and triggers that Python cannot see are in `migrations/versions/`."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

invoices = Table(
    "invoices",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, server_default=""),
    Column("idempotency_key", Text, nullable=False),
    Column("payload_sha256", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("series", Text),
    Column("sequence", BigInteger),
    Column("number", Text),
    Column("currency", Text, nullable=False),
    Column("net_minor", BigInteger, nullable=False),
    Column("tax_minor", BigInteger, nullable=False),
    Column("total_minor", BigInteger, nullable=False),
    Column("seller", JSONB, nullable=False),
    Column("buyer", JSONB, nullable=False),
    Column("buyer_reference", Text),
    Column("supply_date", Date),
    Column("due_days", SmallInteger, nullable=False),
    Column("issued_at", DateTime(timezone=True)),
    Column("issued_on", Date),
    Column("due_on", Date),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

invoice_lines = Table(
    "invoice_lines",
    metadata,
    Column("invoice_id", ForeignKey("invoices.id"), primary_key=True),
    Column("position", SmallInteger, primary_key=True),
    Column("description", Text, nullable=False),
    Column("quantity", Numeric, nullable=False),
    Column("unit_price", Numeric, nullable=False),
    Column("tax_category", Text, nullable=False),
    Column("tax_rate", Numeric, nullable=False),
    Column("net_minor", BigInteger, nullable=False),
)

invoice_tax_groups = Table(
    "invoice_tax_groups",
    metadata,
    Column("invoice_id", ForeignKey("invoices.id"), primary_key=True),
    Column("category", Text, primary_key=True),
    Column("rate", Numeric, primary_key=True),
    Column("taxable_minor", BigInteger, nullable=False),
    Column("tax_minor", BigInteger, nullable=False),
    Column("exemption_reason", Text),
)

invoice_counters = Table(
    "invoice_counters",
    metadata,
    Column("series", Text, primary_key=True),
    Column("last", BigInteger, nullable=False),
)

ledger_transactions = Table(
    "ledger_transactions",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("source_id", Uuid, nullable=False),
    Column("entry_count", SmallInteger, nullable=False),
    Column("posted_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
)

ledger_entries = Table(
    "ledger_entries",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("transaction_id", ForeignKey("ledger_transactions.id"), nullable=False),
    Column("account", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("invoice_id", ForeignKey("invoices.id"), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("template_version", Integer, primary_key=True),
    Column("id", Uuid, nullable=False, unique=True),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("media_type", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
