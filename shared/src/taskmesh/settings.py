"""Settings that every role of every service has. Built once in an entry point and handed down.

There is no default for a secret or an address: a missing one stops the process at start and names the variable.
A variable may be a file of that name in the folder that `TASKMESH_SECRETS_DIR` names, so that a secret need not be in
the environment, which child processes inherit and crash reports print.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


def _postgres(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://")
    return value


def _amqp(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("amqp://", "amqps://")):
        raise ValueError("must start with amqp:// or amqps://")
    return value


PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres)]
AmqpUrl = Annotated[SecretStr, AfterValidator(_amqp)]


class ServiceSettings(BaseSettings):
    """What each role needs: where its database and its broker are, and how it reports."""

    model_config = SettingsConfigDict(env_prefix="TASKMESH_", frozen=True, extra="ignore")

    database_url: PostgresUrl
    """`postgresql://role:password@host:port/database`; setup is given the owner's, every other role its own."""
    amqp_url: AmqpUrl
    """`amqp://user:password@host:port/vhost`, likewise."""
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    health_dir: Path | None = None
    """Where a role writes its `<service>-<role>.ready` and `.alive` files; None writes none."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Of the page that Prometheus scrapes; 0 takes any free port, which the log names. None opens no page."""
    metrics_host: str = "127.0.0.1"
    """Where that page can be reached: whoever can reach it can read it. In a container, `0.0.0.0`."""
    baggage_keys: str = ""
    """Keys of W3C Baggage that go along with a caller's work, separated by commas; none by default."""

    @property
    def baggage_allowed(self) -> frozenset[str]:
        """The keys one by one."""
        return frozenset(key.strip() for key in self.baggage_keys.split(",") if key.strip())


class CheckSettings(BaseSettings):
    """The check role looks at the database alone, as any role may."""

    model_config = SettingsConfigDict(env_prefix="TASKMESH_", frozen=True, extra="ignore")

    database_url: PostgresUrl
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    check_wait_seconds: Annotated[float, Field(ge=0)] = 0
    """How long to wait for `setup` to be done; 0 looks once."""


class SetupSettings(ServiceSettings):
    """The setup role also talks to the broker's management API, to set policies."""

    management_url: SecretStr
    """`http://user:password@host:port` of RabbitMQ's management API."""
    setup_wait_seconds: Annotated[float, Field(ge=0)] = 0
    """How long to wait for a database or a broker that is away; 0 fails at once."""


class RelaySettings(ServiceSettings):
    relay_batch_size: Annotated[int, Field(ge=1, le=5000)] = 500
    """Rows claimed and confirmed at a time; 500 is where pipelined confirms stop gaining on one node."""
    relay_poll_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """The longest wait for a due row whose notification was lost."""
    announce_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How often a worker service's relay announces the manifest again."""


class WorkerSettings(ServiceSettings):
    worker_concurrency: Annotated[int, Field(ge=1, le=256)] = 2
    worker_pool: Literal["prefork", "threads", "solo"] = "prefork"
    worker_process_mib: Annotated[int, Field(ge=64)] | None = None
    """A process of the pool `prefork` that has grown beyond so many MiB ends after its task, and is replaced."""
    soft_shutdown_seconds: Annotated[float, Field(ge=0)] = 20.0
    """How long running tasks may go on after SIGTERM before their messages go back to the queue."""
    slow_task_seconds: Annotated[float, Field(gt=0)] = 10.0
    """An attempt that takes so long is exported although its trace is not sampled."""


SECRETS_DIR = "TASKMESH_SECRETS_DIR"

SettingsT = TypeVar("SettingsT", bound=BaseSettings)


def load(settings: type[SettingsT]) -> SettingsT:
    """Read the environment, or end the process with one line for each wrong variable."""
    try:
        return settings(_secrets_dir=os.environ.get(SECRETS_DIR))
    except ValidationError as error:
        prefix = settings.model_config.get("env_prefix", "")
        for problem in error.errors():
            variable = prefix + "_".join(str(part) for part in problem["loc"]).upper()
            # The value is left out: it may hold a password.
            sys.stderr.write(f"{variable}: {problem['msg']}\n")
        raise SystemExit(2) from None
