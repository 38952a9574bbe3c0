"""What explains the API: the OpenAPI document, a page to try it from, and a page for each kind of problem."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from gateway.dependencies import GatewayParts
from gateway.openapi import TITLE, LiveOpenApi
from gateway.problems import KINDS, Problem

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def openapi(request: Request, gateway: GatewayParts) -> dict[str, Any]:
    """Describe the API with the task types of this moment."""
    live: LiveOpenApi = request.app.state.openapi
    return live.build(await gateway.catalogue.current())


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Show the OpenAPI document as a page."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title=TITLE)


@router.get("/problems")
async def list_problems() -> dict[str, list[dict[str, Any]]]:
    """List every kind of problem."""
    return {"items": [_describe(code) for code in KINDS]}


@router.get("/problems/{code}", response_model=None)
async def explain_problem(code: str, request: Request) -> Response | dict[str, Any]:
    """Explain a kind of problem: as JSON to programs, as text to people."""
    kind = KINDS.get(code)
    if kind is None:
        raise Problem("not_found", "there is no such kind of problem")
    if "application/json" in request.headers.get("accept", ""):
        return _describe(code)
    return PlainTextResponse(f"{kind.code} ({kind.status})\n\n{kind.title}.\n{kind.advice}\n")


def _describe(code: str) -> dict[str, Any]:
    kind = KINDS[code]
    return {
        "type": f"/problems/{code}",
        "code": code,
        "status": kind.status,
        "title": kind.title,
        "advice": kind.advice,
    }
