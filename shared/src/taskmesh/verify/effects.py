"""What a task has done, as tables of rows, and how two such outcomes are compared.

Rows of the database, messages in the outbox, mails, objects and the output of probes are all the same thing here: a
name, and rows with columns. Two clean runs of one delivery tell which columns vary by themselves (ids, times); every
other column must hold the same values, and every table as many rows, however the task was delivered.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from psycopg import sql

from taskmesh import celery_protocol, exchanges, inbox
from taskmesh.database import LIBRARY_VERSION_TABLE, SERVICE_VERSION_TABLE
from taskmesh.testing.smtp import ReceivedMail

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Effects: TypeAlias = Mapping[str, Rows]
Columns: TypeAlias = Mapping[str, frozenset[str]]

ADVANCE = """
SELECT nextval(format('%I.%I', schemaname, sequencename)::regclass) FROM pg_sequences
WHERE schemaname NOT LIKE 'pg\\_%' AND last_value IS DISTINCT FROM max_value
"""

LIBRARY_TABLES = frozenset({*inbox.inbox.metadata.tables, LIBRARY_VERSION_TABLE, SERVICE_VERSION_TABLE})
PROBE_SECONDS = 60.0

TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY 1, 2
"""


def advance_sequences(connection: psycopg.Connection) -> None:
    """Draw one number from each sequence, so that what is made of such numbers is seen to vary.

    A run that dies has drawn its numbers, too, and no rollback brings them back.
    """
    connection.execute(ADVANCE)


def table_effects(connection: psycopg.Connection) -> Iterator[tuple[str, Rows]]:
    """The rows of every table of the service's own."""
    for schema, table in connection.execute(TABLES).fetchall():
        if schema == "public" and table in LIBRARY_TABLES:
            continue
        name = table if schema == "public" else f"{schema}.{table}"
        statement = sql.SQL("SELECT to_jsonb(t) FROM {} t").format(sql.Identifier(schema, table))
        yield f"table {name}", [row[0] for row in connection.execute(statement).fetchall()]


def message_effects(connection: psycopg.Connection, task_id: UUID) -> Iterator[tuple[str, Rows]]:
    """The commands and events that leave with the task's commits: payloads by type, without the task's own retries."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    statement = "SELECT headers, properties, body FROM outbox WHERE exchange <> %s AND task_id IS DISTINCT FROM %s"
    for headers, properties, body in connection.execute(statement, [exchanges.LIFECYCLE, task_id]).fetchall():
        message = celery_protocol.decode(headers, properties, bytes(body))
        arguments = {f"argument {position}": value for position, value in enumerate(message.args)}
        found.setdefault(f"message {message.type}", []).append({**message.payload, **arguments})
    yield from found.items()


def mail_effects(mails: Iterable[ReceivedMail]) -> Iterator[tuple[str, Rows]]:
    """The mails that arrived."""
    rows = [
        {
            "to": sorted(mail.rcpt_to),
            "subject": mail.subject,
            "message_id": mail.message_id,
            "content": hashlib.sha256(mail.content).hexdigest(),
        }
        for mail in mails
    ]
    if rows:
        yield "mails", rows


def object_effects(folder: Path) -> Iterator[tuple[str, Rows]]:
    """The files in the object store."""
    rows = [{"name": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
    if rows:
        yield "objects", rows


def probe_effects(commands: Iterable[str], environment: Mapping[str, str]) -> Iterator[tuple[str, Rows]]:
    """What the probes print; one that fails has its exit code for a row."""
    for command in commands:
        try:
            ended = subprocess.run(
                ["/bin/sh", "-c", command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PROBE_SECONDS,
                check=False,
            )
            row: dict[str, Any] = {"output": ended.stdout.decode(errors="replace"), "exit code": ended.returncode}
        except subprocess.TimeoutExpired:
            row = {"output": "", "exit code": "timed out"}
        yield f"probe `{command}`", [row]


def count_differences(expected: Effects, found: Effects, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """Which tables hold more rows, or fewer, than expected."""
    names = sorted({*expected, *found})
    counts = ((name, len(expected.get(name, ())), len(found.get(name, ()))) for name in names if name not in ignore)
    return [f"{name}: {after}, not {before}" for name, before, after in counts if before != after]


def growth(before: Effects, after: Effects) -> list[str]:
    """By how many rows which tables have grown, or shrunk."""
    grown = ((name, len(after.get(name, ())) - len(before.get(name, ()))) for name in sorted({*before, *after}))
    return [f"{name}: {rows:+d}" for name, rows in grown if rows]


def varying_columns(first: Effects, second: Effects) -> dict[str, frozenset[str]]:
    """The columns that hold different values although the task was delivered in the same way, by table."""
    varying = {name: frozenset(_different_columns(first[name], second.get(name, ()))) for name in first}
    return {name: columns for name, columns in varying.items() if columns}


def differences(
    expected: Effects, found: Effects, *, varying: Columns, ignore: frozenset[str] = frozenset()
) -> list[str]:
    """What is not as expected, in words; values are left out, as they may be personal.

    Args:
        expected: After one clean delivery.
        found: After two deliveries.
        varying: Columns that say nothing, by table.
        ignore: Tables, and columns as `table.column`, that are not compared.
    """
    said = count_differences(expected, found, ignore=ignore)
    for name in sorted({*expected} & {*found} - ignore):
        if len(expected[name]) != len(found[name]):
            continue
        columns = _different_columns(expected[name], found[name]) - varying.get(name, frozenset())
        said += [f"{name}: other values in {column}" for column in sorted(columns) if f"{name}.{column}" not in ignore]
    return said


def _different_columns(first: Rows, second: Rows) -> set[str]:
    columns = {column for row in (*first, *second) for column in row}
    return {column for column in columns if _values(first, column) != _values(second, column)}


def _values(rows: Rows, column: str) -> Counter[str]:
    """The values of a column, as a bag: rows have no order that could be relied upon."""
    return Counter(json.dumps(row.get(column), sort_keys=True) for row in rows)
