"""What the cases of one run share: the servers, how long things may take, and the meshes that are running already."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from meshbench.contest import Turn, take_turns
from meshbench.figures import Figures
from meshbench.ground import Ground, Place
from meshbench.mesh import Mesh
from meshbench.processes import Role, plain_environment
from noop_service import EFFECTS

WARM_SHARE = 0.25
"""Of what a turn does that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much a case does.

    Attributes:
        rounds: Turns of each contestant that count.
        seconds: Of a turn that is timed.
        tasks: Of a turn that works something off.
        rows: In the large ledger.
        waiting: In the queue, for the case that asks what a backlog costs.
        listeners: To one task's stream.
    """

    rounds: int = 3
    seconds: float = 3.0
    tasks: int = 1500
    rows: int = 200_000
    waiting: int = 50_000
    listeners: int = 500
    quick: bool = False


@dataclass
class Stage:
    """Everything that a case starts here ends with the case or with the run."""

    ground: Ground
    sizes: Sizes
    _warming: bool = False
    _meshes: dict[str, Mesh] = field(default_factory=dict)
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def mesh(self, pool: str = "prefork", name: str = "") -> Mesh:
        """The mesh whose worker has this pool: two processes, or eight threads in one; another name is another mesh."""
        name = name or pool
        if name not in self._meshes:
            concurrency = {"prefork": "2", "threads": "8"}[pool]
            made = Mesh(self.ground, name, TASKMESH_WORKER_POOL=pool, TASKMESH_WORKER_CONCURRENCY=concurrency)
            self._meshes[name] = made
            self._exits.callback(made.stop)
        return self._meshes[name]

    @property
    def seconds(self) -> float:
        """How long a turn that is timed takes."""
        return self.sizes.seconds * (WARM_SHARE if self._warming else 1)

    @property
    def tasks(self) -> int:
        """How many tasks a turn works off."""
        return int(self.sizes.tasks * (WARM_SHARE if self._warming else 1))

    def contest(self, contestants: Mapping[str, Turn]) -> dict[str, list[Figures]]:
        """Have everybody do a little of it for nothing, and then all rounds."""
        self._warming = True
        try:
            for turn in contestants.values():
                turn()
        finally:
            self._warming = False
        return take_turns(contestants, self.sizes.rounds)

    def close(self) -> None:
        """Stop what runs."""
        self._exits.close()


class Rival:
    """A place for one rival, and its processes there."""

    def __init__(self, ground: Ground, name: str) -> None:
        self._folder = ground.folder / f"rival-{name}"
        self._folder.mkdir(mode=0o755, exist_ok=True)
        self._ground = ground
        self.place: Place = ground.place(name)
        self.environment = plain_environment() | self.place.environment(self._folder)
        self._roles: list[Role] = []
        with self.database() as database:
            database.execute(EFFECTS)

    def run(self, *words: str) -> None:
        """Run a program to its end."""
        done = subprocess.run(
            [sys.executable, *words], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])

    def start(self, words: Sequence[str], *, ready: str = "rival.ready", name: str = "rival") -> Role:
        """Start a program, and do not wait until it is ready."""
        role = Role.start(words, self.environment, log=self._folder / f"{name}.log", ready=self._folder / ready)
        self._roles.append(role)
        return role

    def wait_until_ready(self) -> None:
        """Wait for all programs that were started."""
        for role in self._roles:
            role.wait_until_ready()

    def serve(self, module: str) -> Role:
        """Serve a rival's application as the gateway is served."""
        return self.start(["-m", "meshbench.serving", module], ready="serving.ready", name="serving")

    def database(self) -> psycopg.Connection:
        return psycopg.connect(self.place.database_url, autocommit=True)

    def roots(self, **roles: Role) -> dict[str, int]:
        """The processes of these roles, and those of the servers."""
        return {name: role.pid for name, role in roles.items()} | dict(self._ground.roots())

    @property
    def folder(self) -> Path:
        return self._folder

    def stop(self) -> None:
        for role in self._roles:
            role.stop()
