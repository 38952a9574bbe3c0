"""A real browser for tests of pages, and pictures of what it shows."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn

from taskmesh_local.spans import Spans
from taskmesh_local.traces import application

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    # A sandbox needs rights that a container's root does not have; every page here is our own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A container's /dev/shm is small.
    "--disable-dev-shm-usage",
)
CI_VARIABLE = "CI"
PICTURES_VARIABLE = "TASKMESH_PICTURES"
IMAGES = Path(__file__).parents[2] / "docs/images"
WIDTH = 1280
MARGIN = 20


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, with a profile of its own that is gone in the end.

    While it is open, the thread has Playwright's event loop: a module that uses it has no async tests. A machine
    without the browser skips, unless it is CI's.
    """
    if not CHROMIUM.exists():
        reason = f"{CHROMIUM} is missing: apt-get install --no-install-recommends chromium"
        pytest.fail(reason) if os.environ.get(CI_VARIABLE) else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def trace_page(file: Path) -> Iterator[str]:
    """The real trace page with its spans in `file`, on a free port; connections wait in the socket's queue until it serves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = application(Spans(file), lambda: "http://gateway.test")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def take_picture(browser: Browser, traces_url: str, trace_id: str, file: Path) -> None:
    """Write a PNG of a trace from its title to the end of its waterfall, 1,280 points wide and in light colours.

    The trace page may be that of a running mesh; the spans of the trace have come.
    """
    context = browser.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
    try:
        page = context.new_page()
        page.goto(f"{traces_url}/traces/{trace_id}")
        top = page.locator("main").bounding_box()
        fall = page.get_by_label("Waterfall").bounding_box()
        assert top, "the page has no content"
        assert fall, "the page has no waterfall"
        height = fall["y"] + fall["height"] + MARGIN - top["y"]
        clip = {"x": 0, "y": top["y"], "width": WIDTH, "height": round(height)}
        file.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=file, full_page=True, clip=clip, animations="disabled", caret="hide")
    finally:
        context.close()


def png_size(file: Path) -> tuple[int, int]:
    """Width and height, from the header."""
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


def picture_file(name: str, otherwise: Path) -> Path:
    """Where a picture of the documentation goes: into docs/images if asked for by the environment, else elsewhere."""
    return (IMAGES if os.environ.get(PICTURES_VARIABLE) else otherwise) / f"{name}.png"
