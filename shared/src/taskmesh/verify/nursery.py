"""Starting workers that are watched, and having them end whatever becomes of the verifier."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from taskmesh.parts.processes import Process, log_end
from taskmesh.verify.harness import Order

LOG_LINES = 15
END_SECONDS = 20.0


class WorkerEnded(Exception):
    """The worker is gone; the text holds the end of its log."""


class Worker:
    """One running worker of the service."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raise WorkerEnded if the worker has ended."""
        if not self._process.is_running():
            raise WorkerEnded(self.log_end())

    def log_end(self) -> str:
        """The last lines of its log."""
        return log_end(self._log, lines=LOG_LINES)

    def kill(self) -> None:
        """End it with its pool, at once."""
        self._process.kill()


class Nursery:
    """The process that forks the workers; use it as a context manager.

    Args:
        folder: Of the sandbox, so that a list of processes tells whose it is.
        environment: What decides where modules are found.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._log = folder / "nursery.log"
        with self._log.open("ab") as log:
            self._harness = subprocess.Popen(
                [sys.executable, "-m", "taskmesh.verify.harness", str(folder)],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A Ctrl-C is the verifier's, who ends the workers in its own time.
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The end of its standard input tells it to end its workers, and then itself.
        try:
            self._harness.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._harness.kill()
            self._harness.communicate()

    def start(self, package: str, *, journal: Path, log: Path, environment: Mapping[str, str]) -> Worker:
        """Start the worker role of the package.

        Raises:
            WorkerEnded: The harness has not come up.
        """
        assert self._harness.stdin
        assert self._harness.stdout
        order = Order(package=package, journal=str(journal), log=str(log), environment=dict(environment))
        try:
            self._harness.stdin.write(order.to_line())
            self._harness.stdin.flush()
        except BrokenPipeError:
            raise WorkerEnded(log_end(self._log, lines=LOG_LINES)) from None
        answer = self._harness.stdout.readline()
        if not answer:
            raise WorkerEnded(log_end(self._log, lines=LOG_LINES))
        return Worker(Process.of(int(answer)), log)
