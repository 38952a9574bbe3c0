"""Processes that outlive the program that started them, told apart from strangers with the same pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
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

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it has ended."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_seconds: float) -> bool:
        """True as soon as the process has ended; False when it has not within the time."""
        deadline = time.monotonic() + timeout_seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def stop(self, timeout_seconds: float, number: signal.Signals = signal.SIGTERM) -> bool:
        """Ask the process to end, and kill it when it has not in time; False if it had to be killed.

        Processes of its session that it has left behind are killed.
        """
        self.send(number)
        ended = self.wait(timeout_seconds)
        self.kill()
        return ended

    def kill(self) -> None:
        """End the process and the rest of its session at once, and wait until it is gone."""
        self.send(signal.SIGKILL)
        for pid in self._session():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(10)

    def uptime_seconds(self) -> float | None:
        """How long the process has been running; None where the system does not tell."""
        ticks = self.started.partition("/")[2]
        try:
            since_boot = float(Path("/proc/uptime").read_text().split()[0])
            return since_boot - int(ticks) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None

    def children(self) -> list[int]:
        """The processes that this one has started and that live, oldest first; none where there is no /proc."""
        return sorted(pid for pid, parent, _ in _living() if parent == self.pid)

    def _session(self) -> list[int]:
        """The other processes of the session that this one leads or led, such as a killed worker's pool."""
        if _started(self.pid) not in (self.started, None):
            # The pid belongs to a stranger now, which it could not while the session still had members.
            return []
        return [pid for pid, _, session in _living() if session == self.pid and pid != self.pid]


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


def _living() -> Iterator[tuple[int, int, int]]:
    """Every process with its parent and the session it is in; none where there is no /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            fields = text[text.rindex(")") + 2 :].split()
            if fields[0] not in "ZX":
                yield int(stat.parent.name), int(fields[1]), int(fields[3])


def _started_by_ps(pid: int) -> str | None:
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return answer[1].strip() if len(answer) == 2 and not answer[0].startswith("Z") else None
