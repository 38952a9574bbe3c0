"""The orders service with tasks whose errors quote what they were given."""

from __future__ import annotations

import os
import signal

from sqlalchemy import text

from orders import app
from taskmesh.errors import PermanentError
from taskmesh.worker import MeshTask, main


def complain(error: BaseException, *_: object) -> None:
    raise RuntimeError(f"a hook that quotes {error}")


@app.task(name="orders.quotes.value", bind=True, on_failure=complain)
def value(self: MeshTask, secret: str) -> None:
    """Fails, and so does its hook."""
    raise ValueError(f"cannot read {secret}")


@app.task(name="orders.quotes.permanent", bind=True)
def permanent(self: MeshTask, secret: str) -> None:
    """Fails in the mesh's own words."""
    raise PermanentError(f"cannot use {secret}")


@app.task(name="orders.quotes.statement", bind=True)
def statement(self: MeshTask, secret: str) -> None:
    """Has a statement refused, whose error quotes its parameters."""
    self.session.execute(text("select cast(:secret as integer)"), {"secret": secret})


@app.task(name="orders.quotes.retry", bind=True, max_retries=1)
def retry(self: MeshTask, secret: str) -> str:
    """Fails once, then returns what it was given."""
    if not self.request.retries:
        raise self.retry(exc=ValueError(f"not yet {secret}"), countdown=0.1)
    return secret


@app.task(name="orders.quotes.result", bind=True)
def result(self: MeshTask, secret: str) -> object:
    """Returns what is no JSON."""
    return {secret: {secret}}


@app.task(name="orders.quotes.poison", bind=True, max_retries=0)
def poison(self: MeshTask, secret: str) -> None:
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="orders.quotes.hold", bind=True, force_cancel=True)
def hold(self: MeshTask, secret: str) -> None:
    """Is there until it is killed."""
    signal.pause()


if __name__ == "__main__":
    main(app)
