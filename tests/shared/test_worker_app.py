"""What can be said of a worker's app without running it."""

from __future__ import annotations

import pytest

from taskmesh.contracts import Command, Event
from taskmesh.worker import MeshTask, WorkerApp


class Knit(Command, type="wool.sock.knit"):
    """Knits a sock."""

    size: int


class Sheared(Event, type="farm.sheep.sheared"):
    """A sheep was sheared."""


def wool() -> WorkerApp:
    app = WorkerApp("wool")

    @app.task(Knit)
    def knit(self: MeshTask, command: Knit) -> None: ...

    @app.task(Sheared)
    def spin(self: MeshTask, event: Sheared) -> None: ...

    return app


def test_the_manifest_has_each_contract_with_its_schema_and_queue() -> None:
    """Commands and listeners, and none of Celery's own tasks."""
    manifest = wool().manifest()

    assert [(known.type, known.kind, known.queue) for known in manifest.types] == [
        ("farm.sheep.sheared", "event", "wool.events"),
        ("wool.sock.knit", "command", "wool"),
    ]
    assert manifest.types[1].payload_schema == Knit.model_json_schema()
    assert manifest.types[1].max_attempts == 6


def test_the_tasks_of_one_app_are_not_those_of_another() -> None:
    """Two services in one process, as in a test, announce their own types only."""
    first = wool()
    second = WorkerApp("farm")

    assert first.manifest().types
    assert second.manifest().types == ()


@pytest.mark.parametrize("name", ["farm.sheep.shear", "knit"])
def test_a_task_that_its_queue_would_never_receive_is_refused(name: str) -> None:
    """The mistake is named when the app is set up, not when work does not arrive."""
    app = wool()

    @app.task(name=name)
    def stray() -> None: ...

    with pytest.raises(ValueError, match=name):
        app.manifest()


def test_a_task_id_must_be_a_uuid() -> None:
    """The ledger and the inbox are keyed by it."""
    with pytest.raises(ValueError, match="must be a UUID"):
        wool().send_task("wool.sock.knit", task_id="sock-42")


def test_beat_schedule_syntax_is_announced() -> None:
    """Crontabs and intervals; the gateway's schedulers run them."""
    from celery.schedules import crontab

    app = wool()
    app.conf.beat_schedule = {
        "nightly": {"task": "wool.sock.knit", "schedule": crontab(hour=2, minute=30), "kwargs": {"size": 42}},
        "often": {"task": "wool.sock.knit", "schedule": 30.0, "kwargs": {"size": 1}},
    }

    nightly, often = app.manifest().schedules

    assert (nightly.cron, nightly.payload, nightly.timezone) == ("30 2 * * *", {"size": 42}, "UTC")
    assert (often.cron, often.interval_seconds) == (None, 30.0)
