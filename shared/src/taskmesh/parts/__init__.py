"""The real parts the mesh stands on, started privately: PostgreSQL and RabbitMQ for a laptop and for tests.

Each part listens on 127.0.0.1 at a port of its own, keeps its data in a folder of its own, and runs as an
unprivileged account where the launcher is root. What was started is recorded in the part's folder, so any later
process can find it, stop it, or start it again on the same data.
"""

from __future__ import annotations

from taskmesh.errors import TaskmeshError


class PartMissing(TaskmeshError):
    """A program is not on this machine; the message is one line that says what to do."""

    code = "part_missing"


class PartDidNotStart(TaskmeshError):
    """A part ended, or did not answer in time; the message holds the end of its log."""

    code = "part_did_not_start"
