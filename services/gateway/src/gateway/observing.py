"""Looking at the broker: whether its management API answers, and how full the queues of the mesh are."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import observations, schedules
from gateway.observations import QueueFacts
from gateway.transactions import transaction
from taskmesh.errors import BrokerUnavailable, PermanentError
from taskmesh.management import Management
from taskmesh.topology import GATEWAY

logger = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 4.0
COLUMNS: Final = ("name", "state", "messages_ready", "messages_unacknowledged", "consumers")

# A quorum queue without a majority, say, has figures of an earlier time.
_COUNTING: Final = frozenset({"running", "idle", "flow", None})
_QUEUE: Final = re.compile(r"([a-z][a-z0-9-]{0,62})(\.events|\.control)?")


class Observer:
    """Writes down what the management API says.

    Args:
        management_url: Of a user that may look and do nothing else (tag `monitoring`).
        vhost: Where the mesh is.
    """

    def __init__(self, engine: AsyncEngine, management_url: SecretStr, vhost: str) -> None:
        self._engine = engine
        self._url = management_url
        self._vhost = vhost
        self._reachable = True

    async def look(self) -> bool:
        """Look once; False if the broker did not answer, which is written down as well.

        Raises:
            DatabaseUnavailable: Nothing could be written down.
        """
        async with transaction(self._engine) as connection:
            # The database's clock, which is also that of the audits; taken before, so that no figure is newer.
            now = await schedules.clock(connection)
        error, queues = "", list[QueueFacts]()
        try:
            # Connecting, sending and reading each have the time of one request.
            found = await asyncio.to_thread(self._list)
            queues = list(facts_of(found, now))
        except (BrokerUnavailable, PermanentError) as failure:
            error = str(failure)
        async with transaction(self._engine) as connection:
            await observations.store_broker(connection, reachable=not error, at=now, error=error or None)
            if not error:
                await observations.store_queues(connection, queues)
        self._report(error)
        return not error

    def _list(self) -> list[dict[str, Any]]:
        with Management(self._url, timeout_seconds=REQUEST_SECONDS) as management:
            return management.queues(self._vhost, columns=COLUMNS)

    def _report(self, error: str) -> None:
        if error and self._reachable:
            logger.warning("broker not observed", extra={"reason": error})
        elif not error and not self._reachable:
            logger.info("broker observed again")
        self._reachable = not error


def facts_of(found: Sequence[Mapping[str, Any]], at: datetime) -> Iterator[QueueFacts]:
    """What is said of the mesh's queues; a queue whose figures are not known yet is left out."""
    for queue in found:
        service = service_of(queue["name"])
        figures = [queue.get(name) for name in COLUMNS[2:]]
        if service is None or queue.get("state") not in _COUNTING or not all(isinstance(one, int) for one in figures):
            continue
        ready, unacknowledged, consumers = (int(one or 0) for one in figures)
        yield QueueFacts(
            queue=queue["name"],
            service=service,
            ready=ready,
            unacknowledged=unacknowledged,
            consumers=consumers,
            observed_at=at,
        )


def service_of(queue: str) -> str | None:
    """The service that a queue belongs to, by its name; None for a queue that is not the mesh's."""
    if queue.startswith(f"{GATEWAY}."):
        return GATEWAY
    found = _QUEUE.fullmatch(queue)
    return found[1] if found else None
