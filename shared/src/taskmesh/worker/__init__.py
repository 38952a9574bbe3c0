"""The worker runtime: Celery's API, through an inbox and an outbox."""

from taskmesh.worker.roles import main  # first: it sets what Celery reads when it is imported

from taskmesh.worker.app import WorkerApp  # isort: skip
from taskmesh.worker.task import MeshTask  # isort: skip

__all__ = ["MeshTask", "WorkerApp", "main"]
