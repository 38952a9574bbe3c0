"""A release can be rolled back by one, because each migration leaves what the code of the release before it needs.

`test_previous_release.py` runs that code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

import billing_worker
import email_worker
import gateway
from schema_changes import Schema, taken_away
from taskmesh import database

LINES = {
    "library": database.LIBRARY_SCRIPTS,
    **{
        package.__name__: Path(str(package.__file__)).parent / "migrations"
        for package in (gateway, billing_worker, email_worker)
    },
}
# The first of each line fills an empty database. One that is called `post` takes away what the release before it has
# stopped to use already.
ADDING = [
    (line, revision.name)
    for line, scripts in LINES.items()
    for revision in sorted((scripts / "versions").glob("[0-9]*_pre_*.py"))[1:]
]

# It notifies as before while no relay keeps watch, and relays of the release before keep none.
BORNE = {
    "0004_pre_outbox_watch.py": ["a function is gone or changed: CREATE OR REPLACE FUNCTION public.notify_outbox()"]
}


@pytest.fixture
def migrated_up_to(database_url, tmp_path, monkeypatch) -> Callable[[str, str, bool], Schema]:
    """Migrates as a release does that has one line's migrations up to a certain one, and all of the library's."""

    def migrate(line: str, revision: str, inclusive: bool) -> Schema:
        scripts = tmp_path / f"{revision}-{inclusive}"
        (scripts / "versions").mkdir(parents=True)
        for each in (LINES[line] / "versions").glob("[0-9]*.py"):
            if each.name < revision or (inclusive and each.name == revision):
                shutil.copy(each, scripts / "versions")
        if line == "library":
            monkeypatch.setattr(database, "LIBRARY_SCRIPTS", scripts)
        database.migrate(database_url, scripts=None if line == "library" else scripts)
        return Schema.of(database_url)

    return migrate


@pytest.mark.parametrize(("line", "revision"), ADDING)
def test_a_migration_takes_nothing_from_the_code_of_the_release_before(migrated_up_to, line, revision):
    before = migrated_up_to(line, revision, False)
    after = migrated_up_to(line, revision, True)

    assert taken_away(before, after) == BORNE.get(revision, [])


@pytest.mark.parametrize(
    ("statement", "missed"),
    [
        ("drop table pauses", "pauses is gone"),
        ("alter table inbox drop column worker", "inbox.worker is gone"),
        ("alter table inbox rename column worker to process", "inbox.worker is gone"),
        ("alter table inbox alter column starts type bigint", "inbox.starts was integer and is bigint"),
        ("alter table inbox alter column worker set not null", "inbox.worker may no longer be null"),
        ("alter table inbox alter column starts drop default", "inbox.starts has no default any more"),
        ("alter table inbox add column tenant text not null", "inbox.tenant is new, and has to be given"),
        ("alter table inbox add check (sequence > 0)", "inbox is held to something new: CHECK ((sequence > 0))"),
        (
            "create unique index one_body on outbox (md5(body))",
            "outbox is held to something new: CREATE UNIQUE INDEX one_body",
        ),
        (
            "alter table cancellations drop constraint cancellations_pkey",
            "cancellations has lost what made its rows unique: CREATE UNIQUE INDEX cancellations_pkey",
        ),
        ("drop trigger outbox_inserted on outbox", "outbox has other triggers: CREATE TRIGGER outbox_inserted"),
    ],
)
def test_what_a_migration_takes_away_is_caught(database_url, statement, missed):
    database.migrate(database_url, scripts=None)
    before = Schema.of(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute(statement)

    [found] = taken_away(before, Schema.of(database_url))
    assert found.startswith(missed)


@pytest.mark.parametrize(
    "statement",
    [
        "create table tenants (id int primary key)",
        "alter table inbox add column tenant text not null default '' check (tenant <> '-')",
        "alter table inbox add column tenant text",
        "create index inbox_state on inbox (state)",
        "alter table inbox alter column sequence drop not null",
    ],
)
def test_what_a_migration_adds_is_no_fault(database_url, statement):
    database.migrate(database_url, scripts=None)
    before = Schema.of(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute(statement)

    assert taken_away(before, Schema.of(database_url)) == []
