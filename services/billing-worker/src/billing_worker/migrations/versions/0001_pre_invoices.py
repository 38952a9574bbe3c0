"""Invoices with their numbers, the ledger, and documents.

The rules that must hold whatever the code does are here: numbers are unique and come with issuing, issued invoices and
posted entries are neither changed nor removed, and no unbalanced transaction commits.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

STATUSES = "('draft', 'open', 'paid', 'void', 'uncollectible')"

# SQLSTATE 0A000: there is no such operation on this table.
REFUSE_CHANGE = """
create function billing_refuse_change() returns trigger language plpgsql as $$
begin
  raise exception '% of % is not allowed: correct it with a new entry', tg_op, tg_table_name
    using errcode = 'feature_not_supported';
end $$
"""

# The status may still move (open to paid, to void), and nothing else about an issued invoice may.
GUARD_INVOICE = """
create function billing_guard_invoice() returns trigger language plpgsql as $$
begin
  if old.status <> 'draft' and (
    tg_op = 'DELETE' or new.status = 'draft'
    or (to_jsonb(new) - 'status') is distinct from (to_jsonb(old) - 'status')
  ) then
    raise exception '% of issued invoice % is not allowed', tg_op, old.id using errcode = 'feature_not_supported';
  end if;
  if tg_op = 'DELETE' then
    return old;
  end if;
  return new;
end $$
"""

GUARD_PART = """
create function billing_guard_invoice_part() returns trigger language plpgsql as $$
begin
  -- On INSERT there is no old row, and on DELETE no new one: their fields are null.
  if exists (select from invoices where id in (old.invoice_id, new.invoice_id) and status <> 'draft') then
    raise exception '% of % is not allowed: the invoice is issued', tg_op, tg_table_name
      using errcode = 'feature_not_supported';
  end if;
  if tg_op = 'DELETE' then
    return old;
  end if;
  return new;
end $$
"""

# Runs at COMMIT, once for the header and once for each entry. The header says how many entries it has, so a
# transaction without entries is caught, and so is an entry added to one that was posted before.
CHECK_BALANCE = """
create function billing_check_balance() returns trigger language plpgsql as $$
declare
  checked uuid := case tg_table_name when 'ledger_transactions' then (to_jsonb(new) ->> 'id')::uuid
                                     else (to_jsonb(new) ->> 'transaction_id')::uuid end;
begin
  if exists (select from ledger_entries where transaction_id = checked group by currency having sum(amount_minor) <> 0)
  then
    raise exception 'ledger transaction % does not balance', checked using errcode = 'check_violation';
  end if;
  if (select count(*) from ledger_entries where transaction_id = checked)
     <> (select entry_count from ledger_transactions where id = checked) then
    raise exception 'ledger transaction % has not the entries it was posted with', checked
      using errcode = 'check_violation';
  end if;
  return null;
end $$
"""


def upgrade() -> None:
    """Create everything."""
    _create_invoices()
    _create_ledger()
    _create_documents()
    for function in (REFUSE_CHANGE, GUARD_INVOICE, GUARD_PART, CHECK_BALANCE):
        op.execute(function)
    op.execute(
        "create trigger invoices_guard before update or delete on invoices "
        "for each row execute function billing_guard_invoice()"
    )
    for table in ("invoice_lines", "invoice_tax_groups"):
        op.execute(
            f"create trigger {table}_guard before insert or update or delete on {table} "
            "for each row execute function billing_guard_invoice_part()"
        )
    for table in ("ledger_transactions", "ledger_entries"):
        op.execute(
            f"create trigger {table}_append_only before update or delete on {table} "
            "for each row execute function billing_refuse_change()"
        )
        op.execute(
            f"create constraint trigger {table}_balance after insert on {table} "
            "deferrable initially deferred for each row execute function billing_check_balance()"
        )
    for table in ("invoices", "invoice_lines", "invoice_tax_groups", "ledger_transactions", "ledger_entries"):
        op.execute(
            f"create trigger {table}_keep before truncate on {table} "
            "for each statement execute function billing_refuse_change()"
        )


def _create_invoices() -> None:
    op.create_table(
        "invoices",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False, server_default=""),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("payload_sha256", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), sa.CheckConstraint(f"status in {STATUSES}"), nullable=False),
        sa.Column("series", sa.Text()),
        sa.Column("sequence", sa.BigInteger(), sa.CheckConstraint("sequence > 0")),
        sa.Column("number", sa.Text()),
        sa.Column("currency", sa.Text(), sa.CheckConstraint("currency ~ '^[A-Z]{3}$'"), nullable=False),
        sa.Column("net_minor", sa.BigInteger(), nullable=False),
        sa.Column("tax_minor", sa.BigInteger(), nullable=False),
        sa.Column("total_minor", sa.BigInteger(), nullable=False),
        sa.Column("seller", JSONB(), nullable=False),
        sa.Column("buyer", JSONB(), nullable=False),
        sa.Column("buyer_reference", sa.Text()),
        sa.Column("supply_date", sa.Date()),
        sa.Column("due_days", sa.SmallInteger(), nullable=False),
        sa.Column("issued_at", sa.DateTime(timezone=True)),
        sa.Column("issued_on", sa.Date()),
        sa.Column("due_on", sa.Date()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("tenant", "idempotency_key", name="invoices_idempotency"),
        sa.UniqueConstraint("series", "sequence", name="invoices_sequence"),
        sa.CheckConstraint("total_minor >= 0 and total_minor = net_minor + tax_minor", name="invoices_total"),
        sa.CheckConstraint(
            "case when status = 'draft' then num_nonnulls(series, sequence, number, issued_at, issued_on, due_on) = 0 "
            "else num_nulls(series, sequence, number, issued_at, issued_on, due_on) = 0 end",
            name="invoices_numbered_when_issued",
        ),
    )
    op.create_index("invoices_number", "invoices", ["number"])
    op.create_table(
        "invoice_lines",
        sa.Column("invoice_id", sa.Uuid(), sa.ForeignKey("invoices.id"), primary_key=True),
        sa.Column("position", sa.SmallInteger(), sa.CheckConstraint("position > 0"), primary_key=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("quantity", sa.Numeric(), nullable=False),
        sa.Column("unit_price", sa.Numeric(), nullable=False),
        sa.Column("tax_category", sa.Text(), nullable=False),
        sa.Column("tax_rate", sa.Numeric(), nullable=False),
        sa.Column("net_minor", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "invoice_tax_groups",
        sa.Column("invoice_id", sa.Uuid(), sa.ForeignKey("invoices.id"), primary_key=True),
        sa.Column("category", sa.Text(), primary_key=True),
        sa.Column("rate", sa.Numeric(), primary_key=True),
        sa.Column("taxable_minor", sa.BigInteger(), nullable=False),
        sa.Column("tax_minor", sa.BigInteger(), nullable=False),
        sa.Column("exemption_reason", sa.Text()),
    )
    op.create_table(
        "invoice_counters",
        sa.Column("series", sa.Text(), primary_key=True),
        sa.Column("last", sa.BigInteger(), nullable=False),
    )


def _create_ledger() -> None:
    op.create_table(
        "ledger_transactions",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("source_id", sa.Uuid(), nullable=False),
        sa.Column("entry_count", sa.SmallInteger(), sa.CheckConstraint("entry_count >= 2"), nullable=False),
        sa.Column("posted_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
        sa.UniqueConstraint("kind", "source_id", name="ledger_transactions_source"),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        sa.Column("transaction_id", sa.Uuid(), sa.ForeignKey("ledger_transactions.id"), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), sa.CheckConstraint("amount_minor <> 0"), nullable=False),
    )
    op.create_index("ledger_entries_transaction", "ledger_entries", ["transaction_id"])
    op.create_index("ledger_entries_account", "ledger_entries", ["account", "currency"])


def _create_documents() -> None:
    op.create_table(
        "documents",
        sa.Column("invoice_id", sa.Uuid(), sa.ForeignKey("invoices.id"), primary_key=True),
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("template_version", sa.Integer(), primary_key=True),
        sa.Column("id", sa.Uuid(), nullable=False, unique=True),
        sa.Column("sha256", sa.Text(), sa.CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
