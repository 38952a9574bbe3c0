"""What routes need of the process they run in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.auth import Authenticator
from gateway.catalogue import Catalogue
from gateway.submissions import Submissions
from gateway.waiting import Doorbell


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The parts of one api process; `app.state.gateway`."""

    engine: AsyncEngine
    catalogue: Catalogue
    authenticator: Authenticator
    doorbell: Doorbell
    submissions: Submissions


# FastAPI runs a plain function on another thread, which costs a tenth of a request.
async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayParts = Annotated[Gateway, Depends(_gateway)]
