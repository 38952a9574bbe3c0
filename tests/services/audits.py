"""A second service that listens to what the orders service tells."""

from __future__ import annotations

from taskmesh.contracts import Event
from taskmesh.worker import MeshTask, WorkerApp, main

app = WorkerApp("audits")


class OrderPlaced(Event, type="orders.order.placed"):
    """An order was placed."""

    name: str


@app.task(OrderPlaced)
def note_order(self: MeshTask, event: OrderPlaced) -> str:
    """Listens."""
    return event.name


if __name__ == "__main__":
    main(app)
