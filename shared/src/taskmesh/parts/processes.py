"""Processes that outlive the program that started them, told apart from strangers with the same pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskmesh.parts.accounts import Account


@dataclass(frozen=True, slots=True)
class Process:
    """A process and the moment it started: pids are used again, after a restart of the machine all of them are."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this pid now."""
        return cls(pid, _started(pid) or "ended")

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | None) -> Process | None:
        return cls(int(record["pid"]), str(record["started"])) if record else None

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "started": self.started}

    def is_running(self) -> bool:
        """True while this very process lives; a zombie does not count."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return _started(self.pid) == self.started

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group; nothing happens when it has ended."""
        if not self.is_running():
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout_seconds: float) -> bool:
        """True as soon as the process has ended; False when it has not within the time."""
        deadline = time.monotonic() + timeout_seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def stop(self, timeout_seconds: float, number: signal.Signals = signal.SIGTERM) -> bool:
        """Ask the process to end, and kill its whole group when it has not in time; False if it had to be killed."""
        self.send(number)
        if self.wait(timeout_seconds):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """End the process and its group at once, and wait until it is gone."""
        self.send(signal.SIGKILL, group=True)
        self.wait(10)


def spawn(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    account: Account | None = None,
) -> Process:
    """Start a process in a session of its own, its output appended to `log`; it stays when this program ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment) if environment is not None else None,
            cwd=folder,
            start_new_session=True,
            **(account.popen_arguments() if account else {}),
        )
    process = Process.of(child.pid)
    # Popen would warn about a child it has not waited for; this one is waited for by pid, or by init.
    child.returncode = 0
    return process


def log_end(log: Path, *, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _started(pid: int) -> str | None:
    """What tells this process from an earlier or later one with the same pid; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None if Path("/proc/self").exists() else _started_by_ps(pid)
    except ProcessLookupError:
        return None
    # The name stands in brackets and may hold anything; the state and the 19th field after it are what we need.
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{fields[19]}"


def _started_by_ps(pid: int) -> str | None:
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return answer[1].strip() if len(answer) == 2 and not answer[0].startswith("Z") else None
