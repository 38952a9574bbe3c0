"""`python -m taskmesh_local.collector FILE`: an OTLP/HTTP receiver that costs next to nothing.

It takes every request and appends the bodies of those for spans to a file, each behind its length; without a file it
drops everything. Who wants to know what came reads the file afterwards, also what came twice.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from taskmesh.parts.spans import Span, read_spans

LENGTH_BYTES = 4
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def collecting(path: Path | None) -> Iterator[str]:
    """Run a collector in a process of its own for the block; yields its URL for OTEL_EXPORTER_OTLP_ENDPOINT."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "taskmesh_local.collector", *([str(path)] if path else [])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def collected(path: Path) -> Iterator[Span]:
    """Every span that was received, as often as it was."""
    with path.open("rb") as file:
        while length := file.read(LENGTH_BYTES):
            yield from read_spans(file.read(int.from_bytes(length)))


async def serve(file: BinaryIO | None) -> None:
    """Print a port, and take requests there until cancelled."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                body = await reader.readexactly(length)
                if file and head.startswith(b"post /v1/traces"):
                    file.write(length.to_bytes(LENGTH_BYTES) + body)
                    file.flush()
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Collect until SIGTERM, which ends the process as it ends any."""
    path = sys.argv[1] if len(sys.argv) > 1 else None
    with open(path or "/dev/null", "ab") as file:  # noqa: PTH123 - the same for both
        asyncio.run(serve(file if path else None))


if __name__ == "__main__":
    main()
