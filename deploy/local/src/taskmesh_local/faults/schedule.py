"""What will go wrong, and when: the same seed gives the same faults at the same moments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from taskmesh_local.roles import Role

BROKER = "rabbitmq"
DATABASE = "postgres"

BUSY_QUEUES = ("billing", "email.events", "trials", "trials.events", "gateway.lifecycle", "gateway.dead-letters")
"""The others see little of a campaign's load: full or not would make no difference."""

# The first tasks have to be under way, and the last faults have to meet some.
QUIET_START_SECONDS = 5.0
QUIET_END_SECONDS = 8.0

# A short campaign has no time for long outages, in which little else is seen. In a long one some outlast heartbeats.
USUAL_SECONDS = 12.0
LONGEST_SECONDS = 60.0
LONG_SECONDS = 600.0
LONG_SHARE = 0.15


class Kind(StrEnum):
    """What can be done to a mesh."""

    KILL = "kill"
    """SIGKILL; a role is started again by its supervisor, a server by the campaign."""
    KILL_CHILD = "kill child"
    """SIGKILL of one process of a worker's pool."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT at the end; or SIGKILL, if the fault ends badly."""
    CUT = "cut"
    """Every TCP connection to a server is reset."""
    BLACK_HOLE = "black hole"
    """Nothing passes to or from a server, and nobody is told; the connections go on afterwards, or are reset."""
    SLOW = "slow"
    """Every packet to and from a server is late, and few fit through."""
    MEMORY_ALARM = "memory alarm"
    """The broker takes nothing from publishers."""
    DISK_ALARM = "disk alarm"
    FULL_QUEUE = "full queue"
    """A queue refuses what is published to it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at: Seconds after the beginning of the load.
        victim: A role, a server, or a queue.
        seconds: How long it lasts; of a kill: until the victim is started again.
        badly: Whether a stopped process is killed in the end, or held connections are reset.
        pick: Which of several children.
    """

    at: float
    kind: Kind
    victim: str
    seconds: float
    badly: bool = False
    pick: int = 0

    def __str__(self) -> str:
        manner = ", ends badly" if self.badly else ""
        return f"{self.at:7.1f} s  {self.kind:<13} {self.victim:<22} for {self.seconds:4.1f} s{manner}"


@dataclass(frozen=True, slots=True)
class Victims:
    """What there is to be harmed."""

    roles: Sequence[str]
    workers: Sequence[str]
    queues: Sequence[str]

    @classmethod
    def of(cls, roles: Iterable[Role]) -> Victims:
        """The processes and the queues of a fleet."""
        roles = tuple(roles)
        return cls([role.name for role in roles], [role.name for role in roles if role.role == "worker"], BUSY_QUEUES)


def plan(seed: int, *, seconds: float, count: int, victims: Victims) -> list[Fault]:
    """The faults of a campaign, in the order of their times.

    Every role is killed at least once if there are enough of them, and every kind of fault comes in turn. No victim has
    two faults at a time; different ones have.
    """
    dice = random.Random(f"faults {seed}")  # noqa: S311 - the same faults for the same seed are the point
    deck = _Deck(dice, victims, longest=LONGEST_SECONDS if seconds >= LONG_SECONDS else USUAL_SECONDS)
    rest = max(seconds - QUIET_START_SECONDS - QUIET_END_SECONDS, 1.0)
    moments = sorted(QUIET_START_SECONDS + rest * (number + dice.random()) / count for number in range(count))
    busy: dict[str, float] = {}
    faults = []
    for at in moments:
        fault = deck.draw(at, busy)
        busy[_subject(fault)] = at + fault.seconds + RECOVERY_SECONDS.get((fault.kind, fault.victim), 1.0)
        faults.append(fault)
    return faults


def tally(faults: Iterable[Fault]) -> dict[str, int]:
    """How many faults there are of each kind."""
    return dict(sorted(Counter(f"{fault.kind} {_group(fault)}".strip() for fault in faults).items()))


# How long a server that was killed needs before it can be harmed again.
RECOVERY_SECONDS = {(Kind.KILL, BROKER): 14.0, (Kind.KILL, DATABASE): 5.0}

# Each round of the deck holds so many of each, beside a kill of every role.
ROUND: tuple[tuple[Kind, str, int], ...] = (
    (Kind.KILL, BROKER, 1),
    (Kind.KILL, DATABASE, 1),
    (Kind.STOP, BROKER, 1),
    (Kind.STOP, DATABASE, 1),
    (Kind.CUT, BROKER, 2),
    (Kind.CUT, DATABASE, 2),
    (Kind.BLACK_HOLE, BROKER, 1),
    (Kind.BLACK_HOLE, DATABASE, 1),
    (Kind.SLOW, BROKER, 1),
    (Kind.SLOW, DATABASE, 1),
    (Kind.MEMORY_ALARM, BROKER, 1),
    (Kind.DISK_ALARM, BROKER, 1),
    (Kind.FULL_QUEUE, "", 2),
    (Kind.KILL_CHILD, "", 6),
    (Kind.STOP, "", 6),
)


@dataclass(slots=True)
class _Deck:
    """Faults in random order, shuffled anew when all have been drawn."""

    dice: random.Random
    victims: Victims
    longest: float
    cards: list[tuple[Kind, str]] = field(default_factory=list)

    def draw(self, at: float, busy: dict[str, float]) -> Fault:
        """The next fault whose victim is well at that moment."""
        for _ in range(2):
            for index, (kind, victim) in enumerate(self.cards):
                chosen = self._fault(at, kind, victim)
                if busy.get(_subject(chosen), 0.0) <= at:
                    del self.cards[index]
                    return chosen
            self.cards += self._round()
        raise ValueError("too many faults for so short a time")

    def _round(self) -> list[tuple[Kind, str]]:
        cards = [(Kind.KILL, role) for role in self.victims.roles]
        for kind, victim, times in ROUND:
            cards += [(kind, victim)] * times
        self.dice.shuffle(cards)
        return cards

    def _fault(self, at: float, kind: Kind, victim: str) -> Fault:
        dice = self.dice
        if not victim:
            victim = dice.choice(
                {Kind.FULL_QUEUE: self.victims.queues, Kind.KILL_CHILD: self.victims.workers}.get(
                    kind, self.victims.roles
                )
            )
        match kind:
            case Kind.KILL if victim in {BROKER, DATABASE}:
                seconds = dice.uniform(0.0, 3.0)
            case Kind.KILL:
                seconds = dice.uniform(0.2, 5.0)
            case Kind.KILL_CHILD | Kind.CUT:
                seconds = 0.0
            case Kind.STOP if victim in {BROKER, DATABASE}:
                seconds = dice.uniform(1.0, USUAL_SECONDS / 2)
            case _ if dice.random() < LONG_SHARE:
                seconds = dice.uniform(USUAL_SECONDS / 2, self.longest)
            case _:
                seconds = dice.uniform(2.0, USUAL_SECONDS)
        badly = kind in {Kind.STOP, Kind.BLACK_HOLE} and victim not in {BROKER, DATABASE} and dice.random() < 0.3
        if kind is Kind.BLACK_HOLE:
            badly = dice.random() < 0.5
        return Fault(round(at, 1), kind, victim, round(seconds, 1), badly=badly, pick=dice.randrange(1000))


def _subject(fault: Fault) -> str:
    """What a fault occupies: the broker for its alarms and queues, a role for its children."""
    return BROKER if fault.kind is Kind.FULL_QUEUE else fault.victim


def _group(fault: Fault) -> str:
    if fault.kind in {Kind.MEMORY_ALARM, Kind.DISK_ALARM, Kind.FULL_QUEUE, Kind.KILL_CHILD}:
        return ""
    return fault.victim if fault.victim in {BROKER, DATABASE} else "role"
