"""Starting, watching and stopping everything."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from taskmesh.parts import PartDidNotStart
from taskmesh.parts.ports import is_answering
from taskmesh.parts.postgres import GivenPostgres, Postgres
from taskmesh.parts.processes import Process, log_end, spawn
from taskmesh.parts.rabbitmq import RabbitMQ
from taskmesh_local import backing, environment
from taskmesh_local.backing import Access, AnyBroker, AnyPostgres
from taskmesh_local.folders import FOLDER_VARIABLE, Folders
from taskmesh_local.progress import Progress
from taskmesh_local.roles import FLEET, PAGES, Fleet, Role
from taskmesh_local.state import State

READY_SECONDS = 90.0
STOP_SECONDS = 30.0
ADDRESSED = ("gateway-api", *PAGES)
"""The processes that are reached over HTTP."""
SCOPES = (
    "tasks:write,tasks:read,types:read,schedules:read,schedules:write,services:read,services:write,"
    "dead-letters:read,dead-letters:write,reconciliation:read,reconciliation:write"
)


@dataclass(frozen=True, slots=True)
class Standing:
    """How one process of the mesh is."""

    name: str
    process: Process | None
    state: str
    url: str

    @property
    def is_up(self) -> bool:
        return self.state == "up"


class Mesh:
    """One local mesh. The caller holds the lock of its state.

    Args:
        state: What is known of it.
        progress: Is told what happens.
        fleet: What it consists of.
        by_way_of: Gives the URL of a database or a broker that the roles are told in its place, such as a proxy's.
    """

    def __init__(
        self,
        state: State,
        progress: Progress,
        fleet: Fleet = FLEET,
        *,
        by_way_of: Callable[[str], str] = lambda url: url,
    ) -> None:
        self._state = state
        self._progress = progress
        self._fleet = fleet
        self._by_way_of = by_way_of
        self._folders: Folders = state.folders
        self._variables: dict[str, dict[str, str]] = {}

    def up(self, names: Sequence[str] | None = None) -> None:
        """Start what is named (None: all) and does not run; a role whose environment has changed is started again.

        Raises:
            PartMissing: A program is missing; the message says what to do.
            PartDidNotStart: A process ended at once or was not ready in time; the message holds the end of its log.
        """
        names = self._fleet.names if names is None else names
        backing.take_given(self._state)
        database, broker = self._start_parts()
        accesses = backing.create_accounts(self._state, database, broker, self._fleet.services)
        self._state.save()
        self._start_pages([name for name in PAGES if name in names])
        self._state.save()
        wanted = [role for role in self._fleet.roles if role.name in names]
        missing = {role.service for role in wanted if self._state.process(role.name) is None}
        if missing and len(wanted) == len(self._fleet.roles):
            self._set_up(accesses, [service for service in self._fleet.services if service in missing])
        self._start_roles(wanted, accesses)
        if "gateway-api" in names:
            self._ensure_api_key(accesses["gateway"])
            environment.write(self._folders.env, self._exports(database, broker, accesses))
        if len(wanted) == len(self._fleet.roles):
            self._wait_for_types()
        self._state.save()

    def down(self, *, purge: bool) -> None:
        """Stop everything: the door first, the parts last. Data stays, unless it is to be purged."""
        stopping = [name for name in reversed(self._fleet.names) if self._state.last_process(name)]
        with self._progress.step("Services", "finishing what they are doing") as notes:
            killed = self._stop([name for name in stopping if name not in PAGES])
            notes += [f"{name} had to be killed" for name in killed]
        with self._progress.step("Inbox and trace pages", "stopping"):
            self._stop(PAGES)
        broker = backing.known_broker(self._folders)
        database = backing.postgres(self._state)
        with self._progress.step("RabbitMQ", "stopping"):
            if broker and purge:
                broker.purge()
            elif broker:
                broker.stop()
        with self._progress.step("PostgreSQL", "stopping"):
            if not isinstance(database, GivenPostgres):
                database.purge() if purge else database.stop()
        self._state.processes.clear()
        self._state.environments.clear()
        self._state.save()

    def standings(self) -> list[Standing]:
        """How every process of the mesh is, in the order of starting."""
        return [self.standing(name) for name in self._fleet.names]

    def relaunch(self, name: str) -> None:
        """Start a role as `up` has started it, without waiting for it; what is left of it is killed first."""
        role = next(role for role in self._fleet.roles if role.name == name)
        self._launch(role, self._variables[name])

    def standing(self, name: str) -> Standing:
        """How one process of the mesh is."""
        if name == "postgres":
            database = backing.postgres(self._state)
            process = database.process if isinstance(database, Postgres) else None
            up = database.is_running()
            given = isinstance(database, GivenPostgres)
            return Standing(name, process, "up" if up else "down", "given" if given else "")
        if name == "rabbitmq":
            broker = backing.known_rabbitmq(self._state)
            process = broker.process if isinstance(broker, RabbitMQ) else None
            if broker is None or not broker.is_running():
                return Standing(name, process, "down", "")
            return Standing(name, process, "up", f"http://{_without_password(broker.management_url)}")
        process = self._state.process(name)
        if process is None:
            return Standing(name, None, "down", "")
        return Standing(name, process, "up" if self._is_ready(name) else "not ready", self.url(name))

    def url(self, name: str) -> str:
        """Where the process of this name is reached over HTTP; empty if it is not."""
        port = self._state.ports.get(name)
        return f"http://127.0.0.1:{port}" if port and name in ADDRESSED else ""

    def management_url(self) -> str:
        """RabbitMQ's management page."""
        broker = backing.known_rabbitmq(self._state)
        return f"http://{_without_password(broker.management_url)}" if broker else ""

    def _start_parts(self) -> tuple[AnyPostgres, AnyBroker]:
        # Finding the broker may ask the person at the terminal, so it comes before anything moves on the screen.
        broker = backing.rabbitmq(self._state, say=self._progress.say)
        database = backing.postgres(self._state)
        self._state.save()
        with self._progress.step("PostgreSQL", "starting") as notes:
            database.start()
            notes.append(_without_password(database.url))
        with self._progress.step("RabbitMQ", "starting (the first time takes some seconds)") as notes:
            broker.start()
            notes.append(_without_password(broker.amqp_url))
        return database, broker

    def _start_pages(self, names: Sequence[str]) -> None:
        if all(self._state.process(name) for name in names):
            return
        with self._progress.step("Inbox and trace pages", "starting") as notes:
            for name in names:
                if self._state.process(name) is None:
                    ports = {"http": self._port(name)}
                    if name == "inbox":
                        ports["smtp"] = self._state.port("smtp")
                    options = [f"--{option}-port={port}" for option, port in ports.items()]
                    command = [sys.executable, "-m", "taskmesh_local", name, *options]
                    self._spawn(name, command, {FOLDER_VARIABLE: str(self._folders.root)})
            self._state.save()
            for name in names:
                self._wait_until_ready(name)
                notes.append(self.url(name))

    def _set_up(self, accesses: Mapping[str, Access], services: Sequence[str]) -> None:
        with self._progress.step("Services set up", "migrating databases, declaring queues, announcing types"):
            # The gateway first: its queue must exist before the others announce themselves to it.
            if "gateway" in services:
                self._set_up_service("gateway", accesses["gateway"])
            others = [service for service in services if service != "gateway"]
            with ThreadPoolExecutor() as threads:
                list(threads.map(lambda service: self._set_up_service(service, accesses[service]), others))

    def _set_up_service(self, service: str, access: Access) -> None:
        variables = self._service_variables(service) | {
            "TASKMESH_DATABASE_URL": access.database.owner_url,
            "TASKMESH_AMQP_URL": access.broker.setup_amqp_url,
            "TASKMESH_MANAGEMENT_URL": access.broker.setup_management_url,
        }
        name = f"{service}-setup"
        log = self._folders.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            answer = subprocess.run(
                [sys.executable, "-m", self._fleet.packages[service], "setup"],
                env=environment.of_process(variables, mesh_file=self._folders.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if answer.returncode != 0:
            raise PartDidNotStart(f"{name} failed. The end of {log}:\n{log_end(log, lines=20)}")

    def _start_roles(self, roles: Sequence[Role], accesses: Mapping[str, Access]) -> None:
        variables = {role.name: self._role_variables(role, accesses[role.service]) for role in roles}
        self._variables |= variables
        changed = [
            role.name
            for role in roles
            if self._state.process(role.name)
            and self._state.environments.get(role.name) != environment.digest(variables[role.name])
        ]
        self._stop(changed)
        missing = [role for role in roles if self._state.process(role.name) is None]
        if not missing:
            return
        with self._progress.step("Services", "starting " + ", ".join(role.name for role in missing)) as notes:
            for role in missing:
                self._launch(role, variables[role.name])
            self._state.save()
            for role in missing:
                self._wait_until_ready(role.name)
            notes.append("1 process" if len(missing) == 1 else f"{len(missing)} processes")

    def _launch(self, role: Role, variables: Mapping[str, str]) -> None:
        # A killed role has left its file behind, which would call the new one ready at once.
        (self._folders.health / f"{role.name}.ready").unlink(missing_ok=True)
        self._spawn(role.name, role.command, variables)

    def _port(self, name: str) -> int:
        """The port of a process that is about to start."""
        return self._state.port(name, self._fleet.preferred_ports.get(name, ()))

    def _service_variables(self, service: str) -> dict[str, str]:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url("traces"),
            **self._fleet.variables,
            "TASKMESH_HEALTH_DIR": str(self._folders.health),
        }
        if service != "gateway":
            variables["TASKMESH_OBJECT_STORE_URL"] = self._folders.objects.as_uri()
        if service == "email":
            variables["TASKMESH_SMTP_URL"] = f"smtp://127.0.0.1:{self._state.ports['smtp']}"
        return variables

    def _role_variables(self, role: Role, access: Access) -> dict[str, str]:
        variables = self._service_variables(role.service) | {
            "TASKMESH_DATABASE_URL": self._by_way_of(access.database.url),
            "TASKMESH_AMQP_URL": self._by_way_of(access.broker.amqp_url),
        }
        if role.name == "gateway-api":
            running = self._state.process(role.name) is not None
            port = self._state.ports[role.name] if running else self._port(role.name)
            variables |= {"TASKMESH_HTTP_HOST": "127.0.0.1", "TASKMESH_HTTP_PORT": str(port)}
        if role.name == "gateway-reconciler" and access.observer_url is not None:
            variables["TASKMESH_MANAGEMENT_URL"] = access.observer_url
        return variables

    def _spawn(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        if before := self._state.last_process(name):
            before.kill()
        self._folders.objects.mkdir(parents=True, exist_ok=True)
        process = spawn(
            command,
            log=self._folders.log(name),
            environment=environment.of_process(variables, mesh_file=self._folders.env),
            folder=self._folders.root,
        )
        self._state.processes[name] = process.to_json()
        self._state.environments[name] = environment.digest(variables)

    def _is_ready(self, name: str) -> bool:
        if name in PAGES:
            return is_answering(self._state.ports[name])
        if not (self._folders.health / f"{name}.ready").exists():
            return False
        if name == "gateway-api":
            try:
                return httpx.get(f"{self.url(name)}/readyz", timeout=5, trust_env=False).is_success
            except httpx.HTTPError:
                return False
        return True

    def _wait_until_ready(self, name: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        log = self._folders.log(name)
        while not self._is_ready(name):
            if self._state.process(name) is None:
                raise PartDidNotStart(f"{name} ended at once. The end of {log}:\n{log_end(log, lines=20)}")
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"{name} was not ready within {READY_SECONDS:.0f} s; see {log}")
            time.sleep(0.1)

    def _stop(self, names: Sequence[str]) -> list[str]:
        """Stop all of these at the same time; return those that had to be killed."""
        processes = {name: process for name in names if (process := self._state.last_process(name))}
        with ThreadPoolExecutor(max_workers=len(processes) or 1) as threads:
            stopped = dict(zip(processes, threads.map(lambda p: p.stop(STOP_SECONDS), processes.values()), strict=True))
        for name in processes:
            self._state.processes.pop(name, None)
            (self._folders.health / f"{name}.ready").unlink(missing_ok=True)
        self._state.save()
        return [name for name, in_time in stopped.items() if not in_time]

    def _ensure_api_key(self, access: Access) -> None:
        """Make an API key once; a new one when the gateway no longer knows it."""
        if self._state.api_key and self._get_types() is not None:
            return
        answer = subprocess.run(
            [sys.executable, "-m", "gateway", "keys", "create", "--name", "local", "--scopes", SCOPES],
            env=environment.of_process({"TASKMESH_DATABASE_URL": access.database.url}, mesh_file=self._folders.env),
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode != 0:
            raise PartDidNotStart(f"the gateway made no API key: {answer.stderr.strip()[-1000:]}")
        self._state.api_key = answer.stdout.strip().splitlines()[-1]
        self._state.save()

    def _get_types(self) -> list[str] | None:
        """The task types that the gateway knows; None if it does not accept our key."""
        headers = {"Authorization": f"Bearer {self._state.api_key}"}
        try:
            answer = httpx.get(f"{self.url('gateway-api')}/v1/types", headers=headers, timeout=10, trust_env=False)
        except httpx.HTTPError:
            return None
        return [item["type"] for item in answer.json()["items"]] if answer.is_success else None

    def _wait_for_types(self) -> None:
        """Return when every worker's types can be submitted."""
        if self._has_all(self._get_types()):
            return
        with self._progress.step("Catalogue", "waiting for the workers' types"):
            deadline = time.monotonic() + READY_SECONDS
            while not self._has_all(self._get_types()):
                if time.monotonic() > deadline:
                    raise PartDidNotStart("the gateway did not learn the workers' types; see `make logs`")
                time.sleep(0.2)

    def _has_all(self, types: list[str] | None) -> bool:
        services = {name.partition(".")[0] for name in types or ()}
        return services.issuperset(service for service in self._fleet.services if service != "gateway")

    def _exports(
        self,
        database: AnyPostgres,
        broker: AnyBroker,
        accesses: Mapping[str, Access],
    ) -> dict[str, str]:
        amqp_url = backing.admin_amqp_url(self._state, broker)
        return {
            "TASKMESH_URL": self.url("gateway-api"),
            "TASKMESH_API_KEY": self._state.api_key or "",
            "TASKMESH_INBOX_URL": self.url("inbox"),
            "TASKMESH_TRACES_URL": self.url("traces"),
            "TASKMESH_AMQP_URL": amqp_url,
            "TASKMESH_MANAGEMENT_URL": broker.management_url,
            # What tells a later `make up` in a shell with these variables that the broker is its own.
            "TASKMESH_LOCAL_AMQP_URL": amqp_url,
            "TASKMESH_LOCAL_MANAGEMENT_URL": broker.management_url,
            "TASKMESH_POSTGRES_URL": database.url,
            **{
                f"TASKMESH_{service.upper()}_DATABASE_URL": access.database.owner_url
                for service, access in accesses.items()
            },
        }


def _without_password(url: str) -> str:
    """The address in a URL: what a person may see on the screen."""
    return url.rpartition("@")[2].partition("/")[0] if "@" in url else url
