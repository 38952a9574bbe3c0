"""`python -m meshbench.serving MODULE`: serves a rival's `app` exactly as the gateway is served."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import uvicorn

from gateway.api import http_config
from gateway.settings import ApiSettings
from taskmesh import garbage
from taskmesh.settings import load

READY = "serving.ready"


def main() -> None:
    """Serve one process until told to stop."""
    app = importlib.import_module(sys.argv[1]).app
    settings = load(ApiSettings)
    config = http_config(app, settings)
    listener = config.bind_socket()
    garbage.spare_the_program()
    host, port = listener.getsockname()[:2]
    print(f"serving http://{host}:{port}", flush=True)
    (settings.health_dir or Path()).joinpath(READY).touch()
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
