"""Documents by typst: the template is code of ours, the invoice is data, and the same invoice gives the same bytes.

typst works with a pool of threads that a forked child inherits dead, and then waits for: a process that has compiled
anything must not fork. So a `Renderer` belongs to one process, and compiles only there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import typst

from billing_worker import fonts
from billing_worker.errors import RenderingFailed
from billing_worker.invoices import Invoice
from billing_worker.layout import lay_out

logger = logging.getLogger(__name__)

TEMPLATE_VERSION = 1
"""Part of a document's identity: raise it when the template prints something else; old documents stay as they are."""

MEDIA_TYPE = "application/pdf"

# Kept by archives, open to an embedded XML invoice, and strict: a character without a glyph is an error and not a box.
_STANDARD: Final = "a-3b"

_UNDISPLAYED = re.compile(r'the text `"((?:[^"\\]|\\.)*)"` could not be displayed')
_ESCAPE = re.compile(r"\\u\{([0-9a-f]{1,6})\}")
_REPLACEMENT = "\N{WHITE SQUARE}"


class Renderer:
    """Compiles documents in the process that made it; one for each process."""

    def __init__(self) -> None:
        # One thread gains nothing on one document; set before typst starts its pool, which it does once.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        self._pid = os.getpid()
        self._compiler: typst.Compiler | None = None
        self._template = b""
        # A compiler serves one caller at a time; threads of one process take turns.
        self._turn = threading.Lock()

    def render(self, invoice: Invoice) -> bytes:
        """The invoice as PDF/A-3b. Characters that no font has are printed as a square, and logged.

        Raises:
            RenderingFailed: The template does not compile.
            RuntimeError: This process was forked from the one that made the renderer.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a Renderer was made before a fork: make it in the process that renders")
        data = json.dumps(lay_out(invoice), ensure_ascii=False)
        missing: set[str] = set()
        while True:
            try:
                with self._turn:
                    document = self._compile(data, invoice)
            except typst.TypstError as error:
                undisplayed = _undisplayed(error) - missing
                if not undisplayed:
                    raise RenderingFailed(f"invoice {invoice.id} does not render: {error.message}") from error
                missing |= undisplayed
                for cluster in undisplayed:
                    data = data.replace(json.dumps(cluster, ensure_ascii=False)[1:-1], _REPLACEMENT)
                continue
            if missing:
                logger.error(
                    "glyphs missing",
                    extra={"invoice_id": str(invoice.id), "characters": sorted(_codepoints(missing))},
                )
            return document

    def _compile(self, data: str, invoice: Invoice) -> bytes:
        if self._compiler is None:
            self._compiler = self._start()
        document, warnings = self._compiler.compile_with_warnings(
            self._template,
            format="pdf",
            sys_inputs={"invoice": data},
            pdf_standards=[_STANDARD],
            timestamp=int(invoice.issued_at.timestamp()),
        )
        for warning in warnings:
            # Without its fonts typst prints nothing at all, and calls that a success.
            if "unknown font family" in warning.message:
                raise RenderingFailed(f"{warning.message}: install billing-worker with its dependencies")
            logger.warning("typst warned", extra={"invoice_id": str(invoice.id), "warning": warning.message})
        assert isinstance(document, bytes)  # images would be several pages
        return document

    def _start(self) -> typst.Compiler:
        with as_file(files("billing_worker") / "templates") as folder:
            self._template = (folder / "invoice.typ").read_bytes()
            return typst.Compiler(
                # The template reads no file, and none outside this folder could be read.
                root=str(folder),
                font_paths=typst.Fonts(
                    include_system_fonts=False,
                    include_embedded_fonts=False,
                    font_paths=[str(path) for path in fonts.folders()],
                ),
                ignore_system_fonts=True,
                # Nothing is fetched: there is no package here, and nowhere to put one.
                package_path=str(Path(folder, "none")),
                package_cache_path=str(Path(folder, "none")),
            )


def _undisplayed(error: Any) -> set[str]:  # TypstError, whose attributes the stub gives and mypy cannot see at run time
    """The clusters that typst found no glyph for, all of them at once."""
    return {
        _ESCAPE.sub(lambda match: chr(int(match[1], 16)), escaped).replace('\\"', '"').replace("\\\\", "\\")
        for escaped in _UNDISPLAYED.findall(error.diagnostic)
    }


def _codepoints(clusters: set[str]) -> set[str]:
    return {f"U+{ord(character):04X}" for cluster in clusters for character in cluster}
