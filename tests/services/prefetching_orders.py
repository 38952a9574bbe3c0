"""The service of `fragile_orders.py` with a worker that holds many more messages than it runs; Taskmesh's hold no others."""

from __future__ import annotations

from fragile_orders import app
from taskmesh.worker import app as wiring
from taskmesh.worker import main

# The application is configured when it is first used, which is below.
wiring.PREFETCH_MULTIPLIER = 6

if __name__ == "__main__":
    main(app)
