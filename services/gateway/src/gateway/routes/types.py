"""The catalogue of task types over HTTP."""

from __future__ import annotations

from fastapi import APIRouter

from gateway.auth import TypeReader
from gateway.bodies import JsonRoute
from gateway.dependencies import GatewayParts
from gateway.problems import Problem, declare
from gateway.schemas import TypeList, TypeView

router = APIRouter(prefix="/v1/types", tags=["types"], route_class=JsonRoute)


@router.get("", responses=declare())
async def list_types(gateway: GatewayParts, _: TypeReader) -> TypeList:
    """List what every worker service has announced: commands that may be submitted, and events listened to."""
    snapshot = await gateway.catalogue.current()
    return TypeList(items=[TypeView.model_validate(known.view()) for known in snapshot.all()])


@router.get("/{type_name}", responses=declare("unknown_type"))
async def get_type(type_name: str, gateway: GatewayParts, _: TypeReader) -> TypeView:
    """Show one type with the JSON Schema of its payload."""
    known, snapshot = await gateway.catalogue.find_command(type_name)
    known = known or snapshot.find(type_name)
    if known is None:
        raise Problem("unknown_type", "no worker has announced this type", nearest=snapshot.nearest(type_name))
    return TypeView.model_validate(known.view())
