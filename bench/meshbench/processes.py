"""Processes that are measured: they are started, paused and stopped, and asked what they have cost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

READY_SECONDS = 120
STOP_SECONDS = 60
POLL_SECONDS = 0.02
TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024


def tree(root: int) -> list[int]:
    """The process and all that descend from it and live."""
    pids = [root]
    for pid in pids:
        # It may end while we look.
        with contextlib.suppress(OSError):
            # A child belongs to the thread that has started it.
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in children.read_text().split()]
    return pids


def cpu_seconds(root: int) -> float:
    """What a process and its descendants have used so far, with those that have ended and were waited for."""
    ticks = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(value) for value in fields[11:15])
    return ticks / TICKS


def busy_seconds() -> float:
    """What the machine's cores have worked so far, for whomever."""
    name, *ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    assert name == "cpu"
    user, nice, system, _idle, _waiting, *interrupts = (int(value) for value in ticks[:8])
    return (user + nice + system + sum(interrupts)) / TICKS


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process and its descendants, in bytes: what each could touch, and its fair share of what is shared."""

    resident: int
    proportional: int


def memory(root: int) -> Memory:
    """What a process and its descendants hold; zero where the system does not tell."""
    sizes = {"Rss": 0, "Pss": 0}
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for name, kib in re.findall(
                r"^(Rss|Pss): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
            ):
                sizes[name] += 1024 * int(kib)
    return Memory(sizes["Rss"], sizes["Pss"])


def until(
    probe: Callable[[], object], explain: Callable[[], str] = lambda: "", *, seconds: float = READY_SECONDS
) -> None:
    """Look again and again until the probe is true.

    Raises:
        TimeoutError: It was not in time; the message is the explanation.
    """
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            raise TimeoutError(explain())
        time.sleep(POLL_SECONDS)


@dataclass
class Role:
    """A running process with what it has forked, and the file that appears once it is ready."""

    process: subprocess.Popen[bytes]
    log: Path
    ready: Path
    begun: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, words: Sequence[str], environment: Mapping[str, str], *, log: Path, ready: Path) -> Role:
        """Start a Python program, and do not wait until it is ready."""
        ready.unlink(missing_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen([sys.executable, *words], env=environment, stdout=output, stderr=output)
        return cls(process, log, ready)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self) -> float:
        """Return how many seconds its start has taken.

        Raises:
            TimeoutError: It has ended, or was not ready in time; the message is the end of its log.
        """
        until(lambda: self.ready.exists() or self.process.poll() is not None, self.last_words)
        if not self.ready.exists():
            raise TimeoutError(self.last_words())
        return time.monotonic() - self.begun

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def port(self) -> int:
        """Where it serves HTTP, which its log names."""
        found = re.findall(r"http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return int(found[0])

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that descend from it."""
        for pid in tree(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still for the block."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to end, and kill it with all its descendants when it has not in time."""
        family = tree(self.pid)
        self.process.terminate()
        # One that stands still would not hear of it.
        self.send(signal.SIGCONT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(words: Sequence[str], environment: Mapping[str, str], ready: str) -> Iterator[Role]:
    """Run a role until the end of the block; yields it when it is ready."""
    folder = Path(environment["TASKMESH_HEALTH_DIR"])
    role = Role.start(words, environment, log=folder / "log", ready=folder / ready)
    try:
        role.wait_until_ready()
        yield role
    finally:
        role.stop()


def plain_environment() -> dict[str, str]:
    """This process's environment without what would turn something on in those that it starts."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TASKMESH_"))}


@dataclass
class Meter:
    """What named processes cost between `begin` and now.

    Args:
        roots: The processes, each with its descendants.
    """

    roots: Mapping[str, int]
    _before: dict[str, float] = field(default_factory=dict)
    _begun: float = 0.0
    _others: float = 0.0

    def begin(self) -> None:
        self._before = {name: cpu_seconds(pid) for name, pid in self.roots.items()}
        self._begun, self._others = time.monotonic(), self._strangers()

    def cpu(self) -> dict[str, float]:
        """Seconds of processor time since `begin`."""
        return {name: cpu_seconds(pid) - self._before[name] for name, pid in self.roots.items()}

    def elsewhere(self) -> float:
        """How many cores were busy since `begin` with what is not of this benchmark: it makes all rates worse."""
        return max(0.0, self._strangers() - self._others) / (time.monotonic() - self._begun)

    @staticmethod
    def _strangers() -> float:
        # Everything that a run starts, the servers too, descends from this process.
        return busy_seconds() - cpu_seconds(os.getpid())

    def figures(self, count: int, **also: float) -> dict[str, float]:
        """Processor seconds per 1,000 tasks of each and in all, the memory of each now, and what others have used.

        Args:
            count: The tasks that were done since `begin`.
            also: Processor seconds of what was measured in another way; no part of the sum.
        """
        spent = self.cpu()
        made = {f"cpu.{name}": 1000 * seconds / count for name, seconds in (spent | also).items()}
        made["cpu"] = 1000 * sum(spent.values()) / count
        made["elsewhere"] = self.elsewhere()
        made |= {f"mib.{name}": memory(pid).proportional / MIB for name, pid in self.roots.items()}
        return made
