"""Worker services over HTTP: which there are, and whether their workers take tasks."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from gateway import outstanding, services
from gateway.auth import ServiceReader, ServiceWriter, TypeReader
from gateway.bodies import JsonRoute
from gateway.dependencies import GatewayParts
from gateway.problems import Problem, declare
from gateway.schemas import Utc
from gateway.transactions import transaction
from taskmesh.errors import NotFound

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 10
"""The reconciler looks at the broker every few seconds."""

router = APIRouter(prefix="/v1/services", tags=["services"], route_class=JsonRoute)

ServiceName = Annotated[str, Path(max_length=63, pattern=r"^[a-z][a-z0-9-]*$", description="The service's name.")]


class QueueView(BaseModel):
    """One queue of a service, as it was last seen."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    queue: str
    ready: int
    """Messages that wait for a worker."""
    unacknowledged: int
    """Messages that a worker holds: waiting in it, or being run."""
    consumers: int
    observed_at: Utc


class ServiceView(BaseModel):
    """A worker service as the gateway knows it."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    service: str
    release: str
    announced_at: Utc
    """When it was last heard of; its relay announces it every 30 s."""
    types: int
    """How many commands it runs and events it listens to."""
    paused_at: Utc | None
    """Null while its workers take tasks."""
    pause_reason: str | None
    queues: list[QueueView]
    """Empty until the reconciler has looked."""


class ServiceList(BaseModel):
    items: list[ServiceView]


class OutstandingView(BaseModel):
    """What a service's workers have still to do."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    service: str
    waiting: int
    """Tasks that wait for a worker, retries included, or are due within the next minute."""
    oldest_age_seconds: float | None
    """How long the oldest of them has been due; null when that cannot be known, 0 when none waits."""
    work_seconds: float
    """How long one process would take for all of them. Divide it by an acceptable delay to know how many are needed."""


class PauseRequest(BaseModel):
    """Why a service is to be paused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    reason: Annotated[str, Field(max_length=500, pattern=r"^[^\x00]*$")] | None = None
    """Shown with every task that waits for it."""


@router.get("", responses=declare())
async def list_services(gateway: GatewayParts, _: TypeReader) -> ServiceList:
    """List every worker service that has announced itself."""
    async with transaction(gateway.engine) as connection:
        found = await services.list_services(connection)
    return ServiceList(items=[ServiceView.model_validate(service) for service in found])


@router.get("/{service}/outstanding", responses=declare("not_found", "outstanding_unknown", "invalid_request"))
async def get_outstanding(service: ServiceName, gateway: GatewayParts, _: ServiceReader) -> OutstandingView:
    """Tell how much work lies before a service, for an autoscaler: known by the ledger and the broker, or an error."""
    async with transaction(gateway.engine) as connection:
        found = (await outstanding.read(connection, only=service)).get(service)
    if found is None:
        raise NotFound(f"no service {service} has announced itself")
    # A figure of the last known state could have an autoscaler take workers away from work that nobody has counted.
    if not found.is_certain or found.work_seconds is None:
        detail = "the broker was not seen lately, or nobody writes down what workers report"
        raise Problem("outstanding_unknown", detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    return OutstandingView.model_validate(found)


@router.post("/{service}:pause", responses=declare("not_found", "invalid_request", "unsupported_media_type"))
async def pause_service(
    service: ServiceName, client: ServiceWriter, gateway: GatewayParts, request: PauseRequest | None = None
) -> ServiceView:
    """Have a service's workers take no more tasks. What runs is finished; what comes is kept in its queue."""
    reason = request.reason if request is not None else None
    async with transaction(gateway.engine) as connection:
        changed = await services.pause(connection, service, by=client.id, reason=reason)
    logger.info("service paused", extra={"paused_service": service})
    return ServiceView.model_validate(changed)


@router.post("/{service}:resume", responses=declare("not_found", "invalid_request"))
async def resume_service(service: ServiceName, client: ServiceWriter, gateway: GatewayParts) -> ServiceView:
    """Have a service's workers take tasks again."""
    async with transaction(gateway.engine) as connection:
        changed = await services.resume(connection, service, by=client.id)
    logger.info("service resumed", extra={"paused_service": service})
    return ServiceView.model_validate(changed)
