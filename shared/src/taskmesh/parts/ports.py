"""Ports on 127.0.0.1 that nobody uses."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable

# Below Linux's range for outgoing connections (32768 and up): a part that is down must not lose its port to one.
RANGE = range(20_000, 32_000)


def free_port(*, preferred: Iterable[int] = (), taken: Iterable[int] = ()) -> int:
    """A port that can be listened on now, the first preferred one if possible. Somebody else may still take it."""
    refused = set(taken)
    candidates = [*preferred, *random.sample(RANGE, 200)]
    for port in candidates:
        if port not in refused and is_free(port):
            return port
    raise OSError("no free port on 127.0.0.1")


def is_free(port: int) -> bool:
    """True if a server could listen on the port now."""
    for address in ("127.0.0.1", "0.0.0.0"):  # noqa: S104 - a server on all addresses takes our port, too
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def is_answering(port: int) -> bool:
    """True if something accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
