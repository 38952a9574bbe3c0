"""The trace page: receives OTLP over HTTP, searches traces, and shows each as a waterfall."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from taskmesh.parts.spans import read_spans
from taskmesh_local import environment, web
from taskmesh_local.folders import Folders
from taskmesh_local.linking import Tie, ties
from taskmesh_local.overview import BATCH
from taskmesh_local.searching import TraceQuery
from taskmesh_local.spans import Found, Spans
from taskmesh_local.waterfall import waterfall

# The services of this repository keep their colours; any other takes one of the rest by its name.
COLORS = {"gateway": 0, "billing-worker": 1, "email-worker": 2}
OTHER_COLORS = 5
# What the page calls each condition of a search, in the order of its form.
CONDITIONS = {
    "q": "Words",
    "type": "Type",
    "service": "Service",
    "task": "Task",
    "error": "Error",
    "min": "At least",
    "max": "At most",
    "within": "Within the last",
    "since": "From",
    "until": "Until",
    "linked": "Linked to",
    "span": "Span",
    "errors": "With errors",
    "background": "With reads and batches",
}
# More are counted, and listed by a search.
SHOWN_LINKS = 200
UNKNOWN = "No span of this trace has come yet."


class PageQuery(TraceQuery):
    """The page leaves reads and background work out unless asked: they would drown the requests for work."""

    background: bool = False


def application(spans: Spans, gateway_url: Callable[[], str] = str) -> FastAPI:
    """The OTLP receiver, the pages and the JSON API over these spans.

    Args:
        spans: Where they are kept.
        gateway_url: Tells where the gateway is, for links to tasks; empty while nobody knows.
    """
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
        return web.page(request, "traces.html", _list_values(spans, request, spans.find(wanted)))

    @router.get("/traces/{trace_id}", response_class=HTMLResponse)
    def show_trace(request: Request, trace_id: str) -> Response:
        return web.page(request, "trace.html", _trace_values(spans, trace_id) | {"gateway": gateway_url()})

    @router.get("/traces/{trace_id}/spans/{span_id}", response_class=HTMLResponse)
    def show_span(request: Request, trace_id: str, span_id: str) -> Response:
        return web.page(request, "span.html", _span_values(spans, trace_id, span_id) | {"gateway": gateway_url()})

    @router.get("/api/traces")
    def list_traces(wanted: Annotated[TraceQuery, Query()]) -> dict[str, Any]:
        found = spans.find(wanted)
        return {"items": [each.to_json() for each in found.traces], "total": found.total, "next": found.next}

    @router.get("/api/traces/{trace_id}")
    def get_trace(trace_id: str) -> dict[str, Any]:
        values = _trace_values(spans, trace_id)
        # The line counts its spans and tasks; here they are themselves.
        line: dict[str, Any] = values["trace"]
        return line | {
            "spans": [row.to_json() for row in values["fall"].spans],
            "tasks": [task.to_json() for task in values["fall"].tasks],
            "links": [tie.to_json() for tie in values["ties"]],
            "batches": [tie.to_json() for tie in ties(spans.links_to(trace_id, batches=True, limit=SHOWN_LINKS))],
        }

    app.include_router(router)
    return app


def _list_values(spans: Spans, request: Request, found: Found) -> dict[str, Any]:
    asked = {name: value for name, value in request.query_params.items() if value.strip() and name in CONDITIONS}
    choices = {facet: spans.choices(facet) for facet in ("service", "type", "error")}
    return _words(asked.get("q", "")) | {
        "found": found,
        "longest": max((each.ended - each.begun for each in found.traces), default=0) / 1e6 or 1,
        "asked": asked,
        "choices": choices,
        "conditions": [(CONDITIONS[name], asked[name], _without(asked, name)) for name in CONDITIONS if name in asked],
        "older": f"/?{urlencode(asked | {'before': found.next})}" if found.next else None,
    }


def _without(asked: dict[str, str], name: str) -> str:
    """The address of the same search without one of its conditions."""
    # A span is one of the linked trace.
    gone = {name, "span"} if name == "linked" else {name}
    rest = {other: value for other, value in asked.items() if other not in gone}
    return f"/?{urlencode(rest)}" if rest else "/"


def _trace_values(spans: Spans, trace_id: str) -> dict[str, Any]:
    found = spans.get(trace_id)
    if found is None:
        raise HTTPException(404, UNKNOWN)
    trace, own = found
    tied = _ties(spans, trace_id)
    return _words("") | {
        "trace": trace.to_json(),
        "fall": waterfall(trace, own),
        "ties": tied,
        "tied": {tie.span_id for tie in tied},
        "is_batch": trace.sort == BATCH,
        "batches": len(spans.links_to(trace_id, batches=True, limit=SHOWN_LINKS)),
    }


def _ties(spans: Spans, trace_id: str, span_id: str = "") -> Sequence[Tie]:
    links = [*spans.links_from(trace_id, span_id), *spans.links_to(trace_id, span_id, batches=False, limit=SHOWN_LINKS)]
    return ties(link for link in links if link.other_trace != trace_id)


def _span_values(spans: Spans, trace_id: str, span_id: str) -> dict[str, Any]:
    found = spans.get(trace_id)
    rows = {row.span.span_id: row for row in waterfall(*found).spans} if found else {}
    if found is None or span_id not in rows:
        raise HTTPException(404, "This span has not come yet.")
    return _words("") | {
        "trace": found[0].to_json(),
        "row": rows[span_id],
        "ties": _ties(spans, trace_id, span_id),
        "batches": len(spans.links_to(trace_id, span_id, batches=True, limit=SHOWN_LINKS)),
    }


def _words(q: str) -> dict[str, Any]:
    """What every page needs: the words in its search field, and the colours."""
    return {"q": q, "color": _color}


def serve(folders: Folders, *, http_port: int) -> int:
    """Run on 127.0.0.1 until SIGTERM."""

    def gateway_url() -> str:
        # The gateway starts after this page, and may come back elsewhere.
        return environment.read(folders.env).get("TASKMESH_URL", "")

    asyncio.run(web.serve(application(Spans(folders.traces), gateway_url), http_port))
    return 0


def _accepted(content_type: str) -> Response:
    """An empty ExportTraceServiceResponse, in the form the request came in."""
    return Response("{}" if "json" in content_type else b"", media_type=content_type)


def _color(service: str) -> int:
    return COLORS.get(service, len(COLORS) + sum(service.encode()) % OTHER_COLORS)
