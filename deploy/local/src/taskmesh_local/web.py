"""What both pages share: templates, style, and headers that let a browser load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from email.utils import getaddresses
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

HERE = Path(__file__).parent
CONTENT_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self';"
    " frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
)


def application(title: str) -> FastAPI:
    """An application with the shared style, headers and error pages; without FastAPI's documentation pages."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.setdefault("Content-Security-Policy", CONTENT_POLICY)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if not request.url.path.startswith("/static/"):
            response.headers["Cache-Control"] = "no-store"
        return response

    @app.exception_handler(HTTPException)
    async def show_error(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"detail": error.detail}, error.status_code)
        values = {"status_code": error.status_code, "detail": error.detail}
        return page(request, "error.html", values, status_code=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def show_mistake(request: Request, error: RequestValidationError) -> Response:
        """What of a query is wrong, in words: it is typed by a person, or comes from a link that somebody has sent."""
        told = ((each["loc"][-1], each["msg"].removeprefix("Value error, ")) for each in error.errors())
        mistakes = "; ".join(f"{name}: {message}" for name, message in told)
        return await show_error(request, HTTPException(422, mistakes))

    return app


def page(request: Request, template: str, values: Mapping[str, Any], *, status_code: int = 200) -> HTMLResponse:
    """A rendered page."""
    shown = {**values, "title": request.app.title}
    return HTMLResponse(_templates.get_template(template).render(shown), status_code)


def content_disposition(name: str, *, inline: bool) -> str:
    """The header for a download, with a name in any script (RFC 6266)."""
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    return f"{'inline' if inline else 'attachment'}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"


async def serve(app: FastAPI, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")
    await uvicorn.Server(config).serve()


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _milliseconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} µs" if value else "0"
    if value < 1000:
        return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
    if value < 100_000:
        return f"{value / 1000:.2f} s"
    minutes, seconds = divmod(round(value / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _tick(value: float) -> str:
    """A round length, without the digits that are not needed."""
    if not value:
        return "0"
    if value < 1:
        return f"{value * 1000:.6g} µs"
    return f"{value:.6g} ms" if value < 1000 else f"{value / 1000:.6g} s"


def _clock(value: str) -> str:
    """The local time of day, with the date if that is another one; the whole stands in the title of the element."""
    at = datetime.fromisoformat(value).astimezone()
    return at.strftime("%H:%M:%S" if at.date() == datetime.now().astimezone().date() else "%-d %b %H:%M:%S")


def _instant(value: str) -> str:
    """Local date and time to the millisecond."""
    at = datetime.fromisoformat(value).astimezone()
    return f"{at:%-d %b %Y, %H:%M:%S}.{at.microsecond // 1000:03}"


def _mailboxes(header: str) -> list[tuple[str, str]]:
    """Name and address of each mailbox in a header, which a page shows apart: they may run in opposite directions."""
    return getaddresses([header])


_templates.filters |= {
    "bytes": _bytes,
    "milliseconds": _milliseconds,
    "tick": _tick,
    "clock": _clock,
    "instant": _instant,
    "mailboxes": _mailboxes,
}
