"""The trace page: receives OTLP over HTTP, and shows each trace as a waterfall."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from taskmesh.parts.spans import read_spans
from taskmesh_local import web
from taskmesh_local.folders import Folders
from taskmesh_local.spans import Spans, TraceQuery

# The services of this repository keep their colours; any other takes one of the rest by its name.
COLORS = {"gateway": 0, "billing-worker": 1, "email-worker": 2}
OTHER_COLORS = 5


class PageQuery(TraceQuery):
    """The page leaves reads and background work out unless asked: they would drown the requests for work."""

    background: bool = False


def application(spans: Spans) -> FastAPI:
    """The OTLP receiver, the pages and the JSON API over these spans."""
    app = web.application("Taskmesh traces")
    router = APIRouter()

    @router.post("/v1/traces")
    async def receive(request: Request) -> Response:
        content_type = request.headers.get("content-type", "application/x-protobuf")
        encoding = request.headers.get("content-encoding", "")
        try:
            received = read_spans(await request.body(), content_type=content_type, content_encoding=encoding)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        await run_in_threadpool(spans.add, received)
        return _accepted(content_type)

    @router.post("/v1/metrics")
    @router.post("/v1/logs")
    def drop(request: Request) -> Response:
        """Metrics and logs are taken and dropped, so that an exporter does not retry them for ever."""
        return _accepted(request.headers.get("content-type", "application/x-protobuf"))

    @router.get("/", response_class=HTMLResponse)
    def show_list(request: Request, wanted: Annotated[PageQuery, Query()]) -> Response:
        found = spans.find(wanted)
        longest = max((trace["duration_ms"] for trace in found), default=1) or 1
        values = {"traces": found, "longest": longest, "wanted": wanted, "services": spans.services()}
        return web.page(request, "traces.html", values | {"color": _color})

    @router.get("/traces/{trace_id}", response_class=HTMLResponse)
    def show_trace(request: Request, trace_id: str) -> Response:
        found = spans.get(trace_id)
        if found is None:
            raise HTTPException(404, "No span of this trace has come yet.")
        trace, tree = found
        whole = trace["duration_ms"] or 1
        return web.page(request, "trace.html", {"trace": trace, "tree": tree, "whole": whole, "color": _color})

    @router.get("/api/traces")
    def list_traces(wanted: Annotated[TraceQuery, Query()]) -> dict[str, Any]:
        return {"items": spans.find(wanted)}

    @router.get("/api/traces/{trace_id}")
    def get_trace(trace_id: str) -> dict[str, Any]:
        found = spans.get(trace_id)
        if found is None:
            raise HTTPException(404, "No span of this trace has come yet.")
        trace, tree = found
        # The line counts its spans; here they are themselves.
        return trace | {"spans": [placed.to_json() for placed in tree]}

    app.include_router(router)
    return app


def serve(folders: Folders, *, http_port: int) -> int:
    """Run on 127.0.0.1 until SIGTERM."""
    asyncio.run(web.serve(application(Spans(folders.traces)), http_port))
    return 0


def _accepted(content_type: str) -> Response:
    """An empty ExportTraceServiceResponse, in the form the request came in."""
    return Response("{}" if "json" in content_type else b"", media_type=content_type)


def _color(service: str) -> int:
    return COLORS.get(service, len(COLORS) + sum(service.encode()) % OTHER_COLORS)
