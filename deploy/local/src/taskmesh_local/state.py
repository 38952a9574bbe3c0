"""What a local mesh remembers between two commands."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from taskmesh.parts import PartMissing, records
from taskmesh.parts.ports import free_port, is_free
from taskmesh.parts.processes import Process
from taskmesh_local.folders import Folders


@dataclass(slots=True)
class State:
    """Ports, passwords and processes; `save` writes all of it.

    Attributes:
        given: URLs of servers that somebody else runs, under `postgres`, `amqp` and `management`.
        environments: For each running process, a digest of the environment it was started with.
    """

    folders: Folders
    ports: dict[str, int] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: dict[str, str] = field(default_factory=dict)
    api_key: str | None = None

    @classmethod
    def load(cls, folders: Folders) -> State:
        """What was saved last; an empty state if nothing was.

        Raises:
            PartMissing: Somebody has damaged the file.
        """
        try:
            return cls(folders, **records.read(folders.state))
        except (ValueError, TypeError) as error:
            raise PartMissing(
                f"{folders.state} cannot be read ({error}). Move it away and try again; what it named may still run."
            ) from error

    def save(self) -> None:
        record = {name: getattr(self, name) for name in self.__slots__ if name != "folders"}
        records.write(self.folders.state, record)

    def password(self, name: str) -> str:
        """The password of this name, made up when first asked for."""
        return self.passwords.setdefault(name, secrets.token_urlsafe(24))

    def port(self, name: str, preferred: Iterable[int] = ()) -> int:
        """The port of a process that is about to start: the one it had, unless somebody has taken it."""
        known = self.ports.get(name)
        if known is None or not is_free(known):
            taken = [port for other, port in self.ports.items() if other != name]
            self.ports[name] = free_port(preferred=preferred, taken=taken)
        return self.ports[name]

    def process(self, name: str) -> Process | None:
        """The process of this name, if it runs."""
        process = Process.from_json(self.processes.get(name))
        return process if process and process.is_running() else None

    def last_process(self, name: str) -> Process | None:
        """The process of this name that was started last, which may have ended."""
        return Process.from_json(self.processes.get(name))


@contextlib.contextmanager
def locked(folders: Folders) -> Iterator[State]:
    """The state, while no other command changes the mesh."""
    folders.root.mkdir(parents=True, exist_ok=True)
    with folders.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield State.load(folders)
