"""What a campaign is told, and what follows from it: its processes, its faults, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from taskmesh_local.faults import planted
from taskmesh_local.faults.schedule import Fault, Victims, plan
from taskmesh_local.roles import PACKAGES, ROLES, Fleet, Role

TRIALS = "taskmesh_local.faults.trials"
FAULTS_A_MINUTE = 12.0
RATE = 14.0
VARIABLES = {
    # The inbox answers at once or not at all.
    "TASKMESH_SMTP_ANSWER_SECONDS": "5",
    "TASKMESH_RESEND_AFTER_SECONDS": "5",
    "TASKMESH_WORKER_CONCURRENCY": "6",
    # Afterwards the campaign reads which of a worker's children were killed, and by whom.
    "TASKMESH_LOG_FORMAT": "json",
    # A process that is killed takes the spans of so many milliseconds along.
    "OTEL_BSP_SCHEDULE_DELAY": "500",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a campaign is told.

    Attributes:
        seed: Decides the faults and the load.
        minutes: How long load and faults go on.
        rate: Orders a second; an order leads to one task or to several.
        count: How many faults; None: twelve a minute.
        plant: The bug that the roles are given.
        limit_seconds: How long the healed mesh may take to finish its work; None: as long as the load lasted, and ten
            minutes at least.
        standstill_seconds: How long nothing may happen meanwhile although work is left.
        keep: Whether the mesh's folder stays when all is well, too.
        workers: Packages of more workers by their services; their tasks are submitted with the examples of their
            schemas, and have to succeed.
    """

    seed: int
    minutes: float
    rate: float = RATE
    count: int | None = None
    plant: planted.Bug | None = None
    limit_seconds: float | None = None
    standstill_seconds: float = 45.0
    keep: bool = False
    workers: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.minutes * 60.0

    def faults(self) -> list[Fault]:
        """The schedule of faults."""
        count = round(self.minutes * FAULTS_A_MINUTE) if self.count is None else self.count
        return plan(self.seed, seconds=self.seconds, count=count, victims=Victims.of(self.fleet().roles))

    def fleet(self, **variables: str) -> Fleet:
        """The processes of `make up`, the trial worker's and the given workers', with ports that nobody prefers."""
        packages = {"trials": TRIALS, **self.workers}
        added = [Role(service, package, role) for service, package in packages.items() for role in ("relay", "worker")]
        # The door is opened last.
        roles: list[Role] = [*ROLES[:-1], *added, ROLES[-1]]
        if self.plant:
            # A reconciler would mend what is to be found.
            roles = [planted.through(role, self.plant) for role in roles if role.role != "reconciler"]
        return Fleet(PACKAGES | packages, tuple(roles), variables=VARIABLES | variables)

    def replay(self) -> str:
        """The command that runs the same campaign again."""
        words = [f"--seed {self.seed}", f"--minutes {self.minutes:g}", f"--rate {self.rate:g}"]
        words += [f"--faults {self.count}"] if self.count is not None else []
        words += [f"--plant {self.plant}"] if self.plant else []
        words += [f"--worker {service}={package}" for service, package in self.workers.items()]
        return " ".join([".venv/bin/python -m taskmesh_local faults", *words])
