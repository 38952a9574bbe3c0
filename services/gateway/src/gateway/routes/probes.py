"""Probes. `livez` says that the process answers; `readyz` that it can do its work."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import text

from gateway.dependencies import GatewayParts
from gateway.problems import KINDS, MEDIA_TYPE, ProblemDocument
from gateway.transactions import transaction
from taskmesh.errors import DatabaseUnavailable

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Answer while the process turns; looks at nothing else, so that an outage restarts nothing."""
    return {"status": "alive"}


@router.get(
    "/readyz",
    responses={
        503: {
            "description": KINDS["database_unavailable"].title,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/" + ProblemDocument.__name__}}},
        }
    },
)
async def readyz(gateway: GatewayParts) -> dict[str, str]:
    """Answer 200 if the ledger can be written to, and 503 if not or while the process stops."""
    if gateway.doorbell.stopping:
        raise DatabaseUnavailable("the process is stopping")
    async with transaction(gateway.engine) as connection:
        await connection.execute(text("select 1"))
    return {"status": "ready"}
