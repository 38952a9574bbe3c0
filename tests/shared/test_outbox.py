"""The outbox table, in a real database."""

from __future__ import annotations

from uuid import uuid4

from sqlalchemy import func, select

from taskmesh import celery_protocol
from taskmesh.celery_protocol import TaskMessage
from taskmesh.database import migrate, sync_engine
from taskmesh.outbox import outbox, put


def test_a_task_may_send_more_messages_than_a_statement_takes(database_url: str) -> None:
    """PostgreSQL takes 65,535 parameters, which looked like a database that is away."""
    migrate(database_url, scripts=None)
    engine = sync_engine(database_url)
    messages = [celery_protocol.command(TaskMessage(type="orders.order.ship", id=uuid4())) for _ in range(9_000)]

    with engine.begin() as connection:
        put(connection, messages)
        assert connection.scalar(select(func.count()).select_from(outbox)) == len(messages)
    engine.dispose()


def test_a_connection_does_not_outlive_its_network(database_url: str) -> None:
    """Linux alone would wait two hours for an answer that the network has swallowed."""
    engine = sync_engine(database_url)
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        parameters = driver_connection.info.get_parameters()
    engine.dispose()

    assert (parameters["keepalives_idle"], parameters["tcp_user_timeout"]) == ("10", "30000")
