"""What stands in the place of Celery's result backend."""

from __future__ import annotations

from typing import Any

from celery.backends.base import DisabledBackend


class NoResults(DisabledBackend):  # type: ignore[misc]  # Celery has no types
    """Keeps no results: outcomes, and the errbacks that follow them, are told by the attempt that commits them."""

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> None:
        """Send no errbacks: Celery would do so from the main process when a run is over that will be repeated."""
