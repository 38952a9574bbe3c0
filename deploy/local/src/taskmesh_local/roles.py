"""The processes of the mesh, as data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Role:
    """One process of one service.

    Attributes:
        service: Names its database, its broker user and its health file.
        package: What `python -m` runs.
        role: The argument.
        through: A module, with its arguments, that runs the package in Python's place.
    """

    service: str
    package: str
    role: str
    through: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.service}-{self.role}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", *self.through, self.package, self.role]


PACKAGES = {"gateway": "gateway", "billing": "billing_worker", "email": "email_worker"}
SERVICES = tuple(PACKAGES)

# In the order of starting; they are stopped in reverse, so that the door closes first and the ledger hears the rest.
ROLES = (
    Role("gateway", "gateway", "projector"),
    Role("gateway", "gateway", "relay"),
    Role("email", "email_worker", "relay"),
    Role("billing", "billing_worker", "relay"),
    Role("email", "email_worker", "worker"),
    Role("billing", "billing_worker", "worker"),
    Role("gateway", "gateway", "scheduler"),
    Role("gateway", "gateway", "reconciler"),
    Role("gateway", "gateway", "api"),
)
ROLE_NAMES = tuple(role.name for role in ROLES)
PARTS = ("postgres", "rabbitmq")
PAGES = ("inbox", "traces")
NAMES = (*PARTS, *PAGES, *ROLE_NAMES)
PREFERRED_PORTS = {"gateway-api": (8080,), "inbox": (8025,), "traces": (8026,)}


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a mesh consists of.

    Attributes:
        packages: What runs each service, the gateway first.
        roles: In the order of starting.
        preferred_ports: Taken when they are free.
        variables: Told to every process of every service.
    """

    packages: Mapping[str, str]
    roles: Sequence[Role]
    preferred_ports: Mapping[str, Sequence[int]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(self.packages)

    @property
    def names(self) -> tuple[str, ...]:
        return (*PARTS, *PAGES, *(role.name for role in self.roles))


FLEET = Fleet(PACKAGES, ROLES, PREFERRED_PORTS)
"""What `make up` starts."""
