"""The fonts of documents. They come as wheels, so no machine needs fonts of its own, and every machine prints alike."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

# Family, the package that carries it, and the folder inside. Greek and Cyrillic are in Noto Sans; the Japanese cut of
# Noto Sans CJK has Chinese and Korean too, in the shapes that Japanese readers expect. Arabic is not Noto's: it puts
# letters together from strokes and dots, and what is copied or searched in the PDF comes out garbled.
_PACKAGES = (
    ("Noto Sans", "fontpkg_noto_sans", "files"),
    ("Amiri", "fontpkg_amiri", "files"),
    ("Noto Sans CJK JP", "noto_cjk_sans_jp_regular", "."),
    ("Noto Sans CJK JP", "noto_cjk_sans_jp_bold", "."),
)


def folders() -> list[Path]:
    """The folders that hold the fonts; one that is not installed is logged as an error and left out."""
    found: list[Path] = []
    for family, package, inside in _PACKAGES:
        # Found without importing it: the packages' own code is not wanted.
        spec = find_spec(package)
        locations = list(spec.submodule_search_locations or ()) if spec else []
        folder = Path(locations[0], inside) if locations else None
        if folder is None or not folder.is_dir():
            logger.error("font missing", extra={"font_family": family, "font_package": package})
            continue
        found.append(folder)
    return found
