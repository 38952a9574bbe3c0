"""The orders service, with a task that counts something and is killed before it can do anything else."""

from __future__ import annotations

import os
import signal

from orders import app
from taskmesh.metrics.instruments import Counter
from taskmesh.worker import MeshTask, main

COUNTED = Counter("orders.counted", "{time}", "How often the task was begun.")


@app.task(name="orders.metrics.count", bind=True)
def count(self: MeshTask) -> None:
    """Counts once, at its first delivery, which it does not survive."""
    if not (self.request.headers or {}).get("x-delivery-count"):
        COUNTED.add()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(app)
