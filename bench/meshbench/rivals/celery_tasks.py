"""Plain Celery: quorum queue, publisher confirms, late acknowledgement; a task without effect, and one with a row."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from celery import Celery, signals

from meshbench.rivals import AMQP_URL, DATABASE_URL, ready

app = Celery("rival", broker=AMQP_URL)
app.conf.update(
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue="rival",
    task_default_queue_type="quorum",
    task_create_missing_queue_type="quorum",
    worker_hijack_root_logger=False,
)

_local = threading.local()


def database() -> psycopg.Connection[Any]:
    """The connection of this process, or of this thread in a pool of threads."""
    if not hasattr(_local, "connection"):
        _local.connection = psycopg.connect(DATABASE_URL)
    connection: psycopg.Connection[Any] = _local.connection
    return connection


@app.task(name="nothing")
def nothing(name: str = "", sent_at: float | None = None) -> None:
    """Leaves nothing."""


@app.task(name="finish")
def finish(path: str) -> None:
    """Says that everything before it has been taken."""
    Path(path).touch()


@app.task(name="one_row", bind=True)
def one_row(self: Any, name: str = "", sent_at: float | None = None) -> None:  # noqa: ARG001 - as the others
    """Leaves one row, in one transaction."""
    connection = database()
    with connection.transaction():
        connection.execute("insert into effects values (%s, %s)", (UUID(self.request.id), sent_at))


@signals.worker_ready.connect(weak=False)
def _ready(**_: object) -> None:
    ready()
