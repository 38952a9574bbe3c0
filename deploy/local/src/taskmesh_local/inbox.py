"""The inbox: a real SMTP server that delivers to nobody, and pages that show what it received."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

from aiosmtpd.smtp import SMTP, Envelope, Session
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse

from taskmesh_local import web
from taskmesh_local.folders import Folders
from taskmesh_local.mails import Mail, Mails

logger = logging.getLogger(__name__)

MAX_BYTES = 40 * 1024 * 1024
# What a mail's HTML may do in its sandboxed frame: be styled by itself and show pictures it carries.
MAIL_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"

Limit = Annotated[int, Query(ge=1, le=1000)]


class _Receiver:
    """What aiosmtpd calls when a mail has come."""

    def __init__(self, mails: Mails) -> None:
        self._mails = mails

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - its name
        content = envelope.original_content or b""
        await asyncio.to_thread(self._mails.add, envelope.mail_from or "", envelope.rcpt_tos, content)
        return "250 2.0.0 OK: kept for the inbox page"


def application(mails: Mails) -> FastAPI:  # noqa: C901 - one small function per route
    """The pages and the JSON API over these mails."""
    app = web.application("Taskmesh inbox")
    router = APIRouter()

    def find(number: int) -> Mail:
        mail = mails.get(number)
        if mail is None:
            raise HTTPException(404, f"There is no mail {number}.")
        return mail

    @router.get("/", response_class=HTMLResponse)
    def show_list(request: Request, to: str = "", subject: str = "") -> Response:
        found = mails.find(limit=200, to=to, subject=subject)
        values = {"mails": [mail.summary() for mail in found], "total": mails.count(), "to": to, "subject": subject}
        return web.page(request, "inbox.html", values)

    @router.get("/messages/{number}", response_class=HTMLResponse)
    def show_mail(request: Request, number: int) -> Response:
        return web.page(request, "mail.html", {"mail": find(number).details()})

    @router.get("/messages/{number}/html", response_class=HTMLResponse)
    def show_html(number: int) -> Response:
        html = find(number).body("html") or ""
        return HTMLResponse(html, headers={"Content-Security-Policy": MAIL_POLICY})

    @router.get("/messages/{number}/raw")
    def get_raw(number: int) -> Response:
        return Response(find(number).content, media_type="text/plain; charset=utf-8")

    @router.get("/messages/{number}/attachments/{index}")
    def get_attachment(number: int, index: int) -> Response:
        attachments = find(number).attachments
        if not 0 <= index < len(attachments):
            raise HTTPException(404, f"Mail {number} has no attachment {index}.")
        attachment = attachments[index]
        # Only a PDF is shown in the browser: anything else could be a page that runs under our address.
        shown = attachment.media_type == "application/pdf"
        disposition = web.content_disposition(attachment.name, inline=shown)
        media_type = attachment.media_type if shown else "application/octet-stream"
        return Response(attachment.content, media_type=media_type, headers={"Content-Disposition": disposition})

    @router.get("/api/messages")
    def list_messages(limit: Limit = 100, before: int | None = None, to: str = "", subject: str = "") -> dict[str, Any]:
        found = mails.find(limit=limit, before=before, to=to, subject=subject)
        return {"total": mails.count(), "items": [mail.summary() for mail in found]}

    @router.get("/api/messages/{number}")
    def get_message(number: int) -> dict[str, Any]:
        return find(number).details()

    @router.delete("/api/messages", status_code=204)
    def delete_messages() -> None:
        mails.clear()

    app.include_router(router)
    return app


def smtp_server(mails: Mails) -> SMTP:
    """The protocol of one SMTP connection that keeps what it receives."""
    return SMTP(_Receiver(mails), hostname="inbox.taskmesh.local", enable_SMTPUTF8=True, data_size_limit=MAX_BYTES)


def serve(folders: Folders, *, http_port: int, smtp_port: int) -> int:
    """Run both servers on 127.0.0.1 until SIGTERM."""
    return asyncio.run(_serve(folders.mails, http_port, smtp_port))


async def _serve(path: Path, http_port: int, smtp_port: int) -> int:
    mails = Mails(path)
    loop = asyncio.get_running_loop()
    smtp = await loop.create_server(lambda: smtp_server(mails), "127.0.0.1", smtp_port)
    async with smtp:
        await web.serve(application(mails), http_port)
    return 0
