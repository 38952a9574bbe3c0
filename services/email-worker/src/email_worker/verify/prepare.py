"""Puts the document of `billing.document.ready.json` into the object store, for `taskmesh verify --service email`."""

from __future__ import annotations

import os

from taskmesh.objects import ObjectStore

DOCUMENT = b"%PDF-1.4 a document for taskmesh verify\n"

if __name__ == "__main__":
    ObjectStore.open(os.environ["TASKMESH_OBJECT_STORE_URL"]).put(DOCUMENT, "application/pdf")
