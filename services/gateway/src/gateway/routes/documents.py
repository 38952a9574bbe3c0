"""What explains the API: the OpenAPI document, a page to try it from, and a page for each kind of problem."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from gateway.dependencies import GatewayParts
from gateway.openapi import LiveOpenApi
from gateway.problems import KINDS, Problem

router = APIRouter(include_in_schema=False)

SWAGGER_UI: Final = StaticFiles(packages=[("fastapi_offline", "static")])
"""Swagger UI's own files; the application mounts them at /docs/swagger-ui, for the page works without a network."""

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Taskmesh gateway</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui/swagger-ui.css">
<main id="page"></main>
<script src="/docs/swagger-ui/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
"""
_START: Final = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  defaultModelsExpandDepth: -1,
  tryItOutEnabled: true,
});
"""
# Images are drawn in style sheets; nothing runs, and nothing is loaded or asked, that is not ours.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/openapi.json")
async def openapi(request: Request, gateway: GatewayParts) -> Response:
    """Describe the API with the task types of this moment."""
    live: LiveOpenApi = request.app.state.openapi
    return Response(live.build(await gateway.catalogue.current()), media_type="application/json")


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Show the OpenAPI document as a page to try the API from."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js")
async def start_docs() -> Response:
    """Start the page; a file of its own, so that no script has to stand inside the page."""
    return Response(_START, media_type="text/javascript")


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
