"""The processes of the mesh, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Role:
    """One process of one service.

    Attributes:
        service: Names its database, its broker user and its health file.
        package: What `python -m` runs.
        role: The argument.
    """

    service: str
    package: str
    role: str

    @property
    def name(self) -> str:
        return f"{self.service}-{self.role}"


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
    Role("gateway", "gateway", "api"),
)
ROLE_NAMES = tuple(role.name for role in ROLES)
PARTS = ("postgres", "rabbitmq")
PAGES = ("inbox", "traces")
NAMES = (*PARTS, *PAGES, *ROLE_NAMES)
