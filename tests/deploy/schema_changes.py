"""What a migration takes from the code that was written for the schema before it.

A release is rolled back by running its code on the schema of the release after it. So a migration may only add, and
what it adds must not stand in the way of rows that are written by those who do not know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import namedtuple_row

COLUMNS = """
select c.relname as "table", a.attname as name, format_type(a.atttypid, a.atttypmod) as type,
       a.attnotnull as is_required, a.atthasdef or a.attidentity <> '' as has_default
from pg_attribute a join pg_class c on c.oid = a.attrelid
where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v') and a.attnum > 0 and not a.attisdropped
"""
# A unique constraint is here, too, by its index. `columns` of an expression has a null.
UNIQUE_INDEXES = """
select c.relname as "table", pg_get_indexdef(i.indexrelid) as definition,
       array(select a.attname::text from unnest(i.indkey::int[]) k
             left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k) as columns
from pg_index i join pg_class c on c.oid = i.indrelid
where c.relnamespace = 'public'::regnamespace and i.indisunique
"""
CONSTRAINTS = """
select c.relname as "table", pg_get_constraintdef(n.oid) as definition,
       array(select a.attname::text from unnest(n.conkey) k
             join pg_attribute a on a.attrelid = n.conrelid and a.attnum = k) as columns
from pg_constraint n join pg_class c on c.oid = n.conrelid
where c.relnamespace = 'public'::regnamespace and n.contype in ('c', 'f', 'x')
"""
TRIGGERS = """
select c.relname as "table", pg_get_triggerdef(t.oid) as definition
from pg_trigger t join pg_class c on c.oid = t.tgrelid
where c.relnamespace = 'public'::regnamespace and not t.tgisinternal
"""
FUNCTIONS = """
select pg_get_functiondef(oid) as definition from pg_proc
where pronamespace = 'public'::regnamespace and prokind = 'f'
"""


class Column(NamedTuple):
    """What whoever writes a row has to know of a column."""

    type: str
    is_required: bool
    has_default: bool


class Rule(NamedTuple):
    """Something that a table holds its rows to, and the columns that it looks at."""

    table: str
    definition: str
    columns: frozenset[str | None]


@dataclass(frozen=True)
class Schema:
    """A database as code sees it."""

    tables: dict[str, dict[str, Column]]
    unique: frozenset[Rule]
    rules: frozenset[Rule]
    triggers: frozenset[tuple[str, str]]
    functions: frozenset[str]

    @classmethod
    def of(cls, url: str) -> Schema:
        """Read it from a database."""
        with psycopg.connect(url, row_factory=namedtuple_row) as connection:

            def rows(statement: Any) -> list[Any]:
                return connection.execute(statement).fetchall()

            tables: dict[str, dict[str, Column]] = {}
            for each in rows(COLUMNS):
                tables.setdefault(each.table, {})[each.name] = Column(each.type, each.is_required, each.has_default)
            unique, rules = (
                frozenset(Rule(each.table, each.definition, frozenset(each.columns)) for each in rows(statement))
                for statement in (UNIQUE_INDEXES, CONSTRAINTS)
            )
            triggers = frozenset((each.table, each.definition) for each in rows(TRIGGERS))
            return cls(tables, unique, rules, triggers, frozenset(each.definition for each in rows(FUNCTIONS)))


def taken_away(before: Schema, after: Schema) -> list[str]:
    """What code that was written for `before` may miss in `after`, or be refused by it; empty if it suits."""
    return sorted({*_columns(before, after), *_rules(before, after)})


def _columns(before: Schema, after: Schema) -> Iterator[str]:
    for table, columns in before.tables.items():
        now = after.tables.get(table)
        if now is None:
            yield f"{table} is gone"
            continue
        for name, column in columns.items():
            if name not in now:
                yield f"{table}.{name} is gone"
            elif now[name].type != column.type:
                yield f"{table}.{name} was {column.type} and is {now[name].type}"
            elif now[name].is_required and not column.is_required:
                yield f"{table}.{name} may no longer be null"
            elif column.has_default and not now[name].has_default:
                yield f"{table}.{name} has no default any more"
        for name in now.keys() - columns.keys():
            if now[name].is_required and not now[name].has_default:
                yield f"{table}.{name} is new, and has to be given"


def _rules(before: Schema, after: Schema) -> Iterator[str]:
    for rule in (after.rules - before.rules) | (after.unique - before.unique):
        # One that looks at nothing but new columns is met by their defaults.
        known = before.tables.get(rule.table, {}).keys()
        if rule.table in before.tables and (None in rule.columns or rule.columns & known):
            yield f"{rule.table} is held to something new: {rule.definition}"
    # ON CONFLICT names its columns, and fails where no index is unique in them.
    for rule in before.unique - after.unique:
        if rule.table in after.tables:
            yield f"{rule.table} has lost what made its rows unique: {rule.definition}"
    for table, definition in before.triggers ^ after.triggers:
        if table in before.tables:
            yield f"{table} has other triggers: {definition}"
    for definition in before.functions - after.functions:
        yield f"a function is gone or changed: {definition.splitlines()[0]}"
