"""The orders service with a pool that does not end tasks at their time limits, and probes that notice soon."""

from __future__ import annotations

from typing import Any

from celery.concurrency.prefork import TaskPool

from orders import app
from taskmesh.worker import main, probes

apply_async = TaskPool.apply_async


def without_limits(self: TaskPool, *arguments: Any, **options: Any) -> Any:
    return apply_async(self, *arguments, **options | {"timeout": None, "soft_timeout": None})


if __name__ == "__main__":
    probes.LATE_SECONDS = probes.DEAF_SECONDS = 0.5
    TaskPool.apply_async = without_limits
    main(app)
