"""Virtual hosts, and the run-time users of the services in them."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from taskmesh import topology
from taskmesh.errors import NotFound
from taskmesh.management import Management
from taskmesh.parts.rabbitmq.given import Broker

VHOST = "taskmesh"
"""The virtual host of the local mesh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceUsers:
    """The two broker users of one service.

    Attributes:
        setup_amqp_url, setup_management_url: For the setup role: may declare what the service owns, and its policies.
        amqp_url: For every other role: may configure nothing.
    """

    setup_amqp_url: str
    setup_management_url: str
    amqp_url: str


def create_service_users(
    broker: Broker, vhost: str, service: str, *, setup_password: str | None = None, password: str | None = None
) -> ServiceUsers:
    """Make the broker users `<service>-setup` and `<service>` with the rights that `taskmesh.topology` gives them.

    The passwords of existing users are set anew, so the returned URLs always work. Without a password one is made up.
    On a broker with several meshes their names carry the virtual host.
    """
    prefix = "" if vhost == VHOST else f"{vhost}-"
    setup_user, user = f"{prefix}{service}-setup", f"{prefix}{service}"
    setup_password, password = setup_password or secrets.token_urlsafe(24), password or secrets.token_urlsafe(24)
    with Management(broker.management_url) as management:
        management.put_user(setup_user, setup_password, tags=["policymaker"])
        management.put_user(user, password)
        topology.grant(management, vhost, setup_user, topology.setup_permissions(service))
        topology.grant(management, vhost, user, topology.permissions(service))
    return ServiceUsers(
        setup_amqp_url=in_vhost(broker.amqp_url, vhost, user=setup_user, password=setup_password),
        setup_management_url=_as_user(broker.management_url, setup_user, setup_password),
        amqp_url=in_vhost(broker.amqp_url, vhost, user=user, password=password),
    )


def create_observer(broker: Broker, vhost: str, *, password: str | None = None) -> str:
    """Make the broker user `gateway-observer` and return its management URL: it may look, and touch nothing."""
    user = f"{'' if vhost == VHOST else f'{vhost}-'}gateway-observer"
    password = password or secrets.token_urlsafe(24)
    with Management(broker.management_url) as management:
        management.put_user(user, password, tags=["monitoring"])
        management.put_permissions(vhost, user, configure="^$", write="^$", read="^$")
    return _as_user(broker.management_url, user, password)


def create_vhost(management_url: str, vhost: str) -> None:
    """Make a virtual host that the management URL's user may do everything in; one that exists is kept."""
    user = unquote(urlsplit(management_url).username or "")
    with Management(management_url, timeout_seconds=30) as management:
        management.put_vhost(vhost)
        management.put_permissions(vhost, user, configure=".*", write=".*", read=".*")


def delete_vhost(management_url: str, vhost: str) -> None:
    """Delete a virtual host with all it holds; nothing happens if there is none."""
    with Management(management_url, timeout_seconds=30) as management, contextlib.suppress(NotFound):
        management.delete_vhost(vhost)


def in_vhost(amqp_url: str, vhost: str, *, user: str | None = None, password: str | None = None) -> str:
    """The same server's URL for another virtual host, and another user if one is given."""
    parts = urlsplit(amqp_url)
    moved = urlunsplit(parts._replace(path=f"/{quote(vhost, safe='')}"))
    return moved if user is None else _as_user(moved, user, password or "")


def vhost_of(amqp_url: str) -> str:
    """The virtual host of a URL; `/` if it names none."""
    return unquote(urlsplit(amqp_url).path[1:]) or "/"


def _as_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{place}"))
