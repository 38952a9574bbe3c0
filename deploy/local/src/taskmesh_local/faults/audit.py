"""Asking the gateway to account for every task."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

NAMED_AFTER_SECONDS = 12.0
"""A task is named by two audits that are at least ten seconds apart."""
ANSWER_SECONDS = 90.0


async def reconcile(url: str, api_key: str) -> dict[str, Any]:
    """What the second of two audits says, neither of which spares young tasks.

    Raises:
        httpx.HTTPError: The gateway or its reconciler did not answer.
    """
    headers = {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=ANSWER_SECONDS, trust_env=False) as http:
        await _audit(http)
        await asyncio.sleep(NAMED_AFTER_SECONDS)
        return await _audit(http)


async def _audit(http: httpx.AsyncClient) -> dict[str, Any]:
    answer = await http.post("/v1/reconciliation:run", json={"grace_seconds": 0})
    found: dict[str, Any] = answer.raise_for_status().json()
    return found
