"""Dramatiq with one database transaction for each task; messages are acknowledged when the task has returned."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import dramatiq
import psycopg
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Middleware

from meshbench.rivals import AMQP_URL, DATABASE_URL, ready


class SayReady(Middleware):
    """Tells when a worker process has its threads."""

    def after_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - a hook
        ready()


broker = RabbitmqBroker(url=AMQP_URL, confirm_delivery=True)
broker.add_middleware(SayReady())
dramatiq.set_broker(broker)

_local = threading.local()


@dramatiq.actor(queue_name="rival")
def one_row(task_id: str) -> None:
    """Leaves one row, in one transaction."""
    if not hasattr(_local, "connection"):
        _local.connection = psycopg.connect(DATABASE_URL)
    connection: psycopg.Connection[Any] = _local.connection
    with connection.transaction():
        connection.execute("insert into effects values (%s, null)", (UUID(task_id),))
