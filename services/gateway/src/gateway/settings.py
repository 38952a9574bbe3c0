"""What the gateway's roles are told by their environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from taskmesh.settings import PostgresUrl, RelaySettings, ServiceSettings, SetupSettings


class GatewaySetupSettings(SetupSettings):
    """The setup role: the owner's database URL, the broker's administrator."""


class ApiSettings(ServiceSettings):
    """The api role. It is given the broker's address like every role, and never uses it."""

    http_host: str
    http_port: Annotated[int, Field(ge=0, le=65535)]
    """0 takes any free port, which the log names."""
    http_drain_seconds: Annotated[int, Field(ge=1)] = 15
    """How long requests that are being answered may take after SIGTERM."""
    database_pool_size: Annotated[int, Field(ge=1, le=200)] = 20
    database_wait_seconds: Annotated[float, Field(gt=0)] = 3.0
    """The longest wait for a free connection before the caller is told to come back later."""


class ProjectorSettings(ServiceSettings):
    projector_batch_size: Annotated[int, Field(ge=1, le=5000)] = 500
    """Messages that become durable with one commit."""
    idempotency_key_hours: Annotated[float, Field(ge=24)] = 48
    """How long a repeated request still gets its first answer."""
    dead_letter_days: Annotated[float, Field(ge=1)] = 30
    """How long a dead letter is kept once it was replayed or discarded; an open one is kept until then."""


class SchedulerSettings(ServiceSettings):
    scheduler_poll_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """The longest sleep between looks at the schedules."""


class ReconcilerSettings(ServiceSettings):
    """The reconciler role. Of the broker's address it uses the virtual host alone: it looks through the other one."""

    management_url: SecretStr
    """`http://user:password@host:port` of RabbitMQ's management API; a user with the tag `monitoring`, and no rights on
    anything."""
    observe_seconds: Annotated[float, Field(gt=0, le=20)] = 5.0
    """How often the queues are looked at."""
    reconcile_interval_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """The pause between two audits that nobody has asked for."""
    reconcile_grace_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Tasks with newer news than that are on their way, and not examined."""
    redrive: bool = True
    """Send the message of a task again that is unaccounted for."""


class GatewayRelaySettings(RelaySettings):
    """The relay role."""


class KeysSettings(BaseSettings):
    """The keys command needs the database alone."""

    model_config = SettingsConfigDict(env_prefix="TASKMESH_", frozen=True, extra="ignore")

    database_url: PostgresUrl
