"""PostgreSQL and RabbitMQ of a local mesh: started here, or given by environment variables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from taskmesh.parts import PartMissing
from taskmesh.parts.postgres import GivenPostgres, Postgres, ServiceDatabase, create_service_database
from taskmesh.parts.rabbitmq import (
    VHOST,
    DockerRabbitMQ,
    GivenRabbitMQ,
    RabbitMQ,
    ServiceUsers,
    create_observer,
    create_service_users,
    create_vhost,
    find,
    in_vhost,
    vhost_of,
)
from taskmesh.topology import GATEWAY
from taskmesh_local import environment
from taskmesh_local.folders import Folders
from taskmesh_local.state import State

AnyPostgres: TypeAlias = Postgres | GivenPostgres
AnyBroker: TypeAlias = RabbitMQ | DockerRabbitMQ | GivenRabbitMQ


@dataclass(frozen=True, slots=True)
class Access:
    """The URLs of one service: elevated ones for its setup role, narrow ones for the others.

    Attributes:
        observer_url: The broker's management API for whoever may look only; None for services that need not.
    """

    database: ServiceDatabase
    broker: ServiceUsers
    observer_url: str | None = None


def take_given(state: State, variables: Mapping[str, str] = os.environ) -> None:
    """Remember servers that the caller's environment names; URLs of this mesh itself are not such servers.

    A shell that has sourced `.taskmesh/env` has our own URLs in the same variables. The file says so beside each, and
    what it holds now is known, too.

    Raises:
        PartMissing: A broker is named without its management API.
    """
    ours = environment.read(state.folders.env)

    def given(name: str) -> str | None:
        value = variables.get(name)
        own = {ours.get(name), variables.get(name.replace("TASKMESH_", "TASKMESH_LOCAL_", 1))}
        return value if value and value not in own else None

    if database_url := given("TASKMESH_DATABASE_URL"):
        state.given["postgres"] = database_url
    if amqp_url := given("TASKMESH_AMQP_URL"):
        management_url = given("TASKMESH_MANAGEMENT_URL")
        if not management_url:
            raise PartMissing("TASKMESH_AMQP_URL is set: set TASKMESH_MANAGEMENT_URL to its management API, too.")
        state.given |= {"amqp": amqp_url, "management": management_url}


def postgres(state: State) -> AnyPostgres:
    """The database server of the mesh, running or not."""
    if url := state.given.get("postgres"):
        return GivenPostgres(url)
    return Postgres(state.folders.postgres)


def rabbitmq(state: State, *, say: Callable[[str], None]) -> AnyBroker:
    """The broker of the mesh, running or not.

    Raises:
        PartMissing: There is none, and none could be installed.
    """
    if url := state.given.get("amqp"):
        return GivenRabbitMQ(url, state.given["management"])
    return find(state.folders.rabbitmq, say=say)


def known_rabbitmq(state: State) -> AnyBroker | None:
    """The broker this mesh has used before; None before its first start."""
    if url := state.given.get("amqp"):
        return GivenRabbitMQ(url, state.given["management"])
    return known_broker(state.folders)


def known_broker(folders: Folders) -> RabbitMQ | DockerRabbitMQ | None:
    """The broker that was started in the mesh's folder."""
    if (folders.rabbitmq / "rabbitmq.json").exists():
        return RabbitMQ(folders.rabbitmq)
    if (folders.rabbitmq / "rabbitmq-container.json").exists():
        return DockerRabbitMQ(folders.rabbitmq)
    return None


def vhost(state: State) -> str:
    """The virtual host of the mesh: of our own broker `taskmesh`, of a given one that of its URL."""
    return vhost_of(state.given["amqp"]) if "amqp" in state.given else VHOST


def admin_amqp_url(state: State, broker: AnyBroker) -> str:
    """The administrator's URL of the mesh's virtual host."""
    return in_vhost(broker.amqp_url, vhost(state))


def create_accounts(
    state: State,
    database: AnyPostgres,
    broker: AnyBroker,
    services: tuple[str, ...],
) -> dict[str, Access]:
    """Make sure that each service has its database, its virtual host, and its users; repeating it changes nothing."""
    create_vhost(broker.management_url, vhost(state))
    return {
        service: Access(
            create_service_database(
                database.url,
                service,
                owner_password=state.password(f"postgres-{service}-owner"),
                password=state.password(f"postgres-{service}"),
            ),
            create_service_users(
                broker,
                vhost(state),
                service,
                setup_password=state.password(f"rabbitmq-{service}-setup"),
                password=state.password(f"rabbitmq-{service}"),
            ),
            _observer_url(state, broker) if service == GATEWAY else None,
        )
        for service in services
    }


def _observer_url(state: State, broker: AnyBroker) -> str:
    return create_observer(broker, vhost(state), password=state.password("rabbitmq-gateway-observer"))
