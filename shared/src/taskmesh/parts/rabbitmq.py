"""A private RabbitMQ node, and the run-time users of the services."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pika
from pika.exceptions import AMQPError

from taskmesh import topology
from taskmesh.errors import NotFound, TaskmeshError
from taskmesh.management import Management
from taskmesh.parts import PartDidNotStart, PartMissing, packages, records
from taskmesh.parts.accounts import Account, data_folder, unprivileged
from taskmesh.parts.ports import free_port, is_free
from taskmesh.parts.processes import Process, log_end, spawn

ADMIN = "taskmesh_admin"
VHOST = "taskmesh"
"""The virtual host of the local mesh."""
START_SECONDS = 120.0
STOP_SECONDS = 40.0


class Broker(Protocol):
    """A RabbitMQ server with its management API, whoever runs it."""

    @property
    def amqp_url(self) -> str: ...
    @property
    def management_url(self) -> str: ...
    def start(self) -> None: ...
    def is_running(self) -> bool: ...


class RabbitMQ:
    """A RabbitMQ node of our own, started from the installed `rabbitmq-server`.

    It has its own node name, ports, configuration, data, cookie and epmd, all on 127.0.0.1: a RabbitMQ that the machine
    runs already is neither used nor disturbed.

    Args:
        folder: Holds the record of the node (`rabbitmq.json`, private), its log, and its data, unless the
            account of the node cannot reach the folder: the record names where it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = folder / "rabbitmq.json"
        self.log = folder / "rabbitmq.log"

    @property
    def amqp_url(self) -> str:
        """The administrator's URL of the virtual host `/`; known after the first start."""
        record = records.read(self._record)
        return f"amqp://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['amqp']}/%2F"

    @property
    def management_url(self) -> str:
        """The management API with the administrator's name and password in it."""
        record = records.read(self._record)
        return f"http://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['management']}"

    @property
    def process(self) -> Process | None:
        """The node's process while it lives."""
        return self._process("process")

    def is_running(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        """Start the node unless it runs already, and return when it takes messages and answers management calls.

        The first start makes the data folder. The ports stay the same from then on, unless somebody has taken one.

        Raises:
            PartMissing: `rabbitmq-server` is not installed.
            PartDidNotStart: The node ended at once, or did not answer within two minutes.
        """
        if self.is_running() and self._wait_until_ready():
            return
        program = installed_server()
        if program is None:
            raise PartMissing(MISSING)
        account = unprivileged()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stop_epmd()
        home = data_folder(self._folder, account)
        record = records.read(self._record)
        record.setdefault("password", secrets.token_urlsafe(24))
        record.setdefault("cookie", secrets.token_hex(20))
        record["home"] = str(home)
        for _ in range(3):
            record["ports"] = _ports(record.get("ports", {}))
            records.write(self._record, record)
            environment = self._configure(home, record, account)
            record["epmd"] = self._start_epmd(record["ports"]["epmd"], environment, account).to_json()
            process = spawn([program], log=self.log, environment=environment, folder=home, account=account)
            record["process"] = process.to_json()
            records.write(self._record, record)
            if self._wait_until_ready():
                return
            self._stop_epmd()
        raise PartDidNotStart(f"RabbitMQ ended at once. The end of {self.log}:\n{log_end(self.log)}")

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """Stop the node and its epmd; the data stays."""
        if process := self.process:
            process.stop(timeout_seconds)
        self._stop_epmd()

    def kill(self) -> None:
        """Kill the node as a crash would (SIGKILL); `start` recovers its data."""
        if process := self.process:
            process.kill()
        self._stop_epmd()

    def control(self, *words: str) -> str:
        """Run `rabbitmqctl` against the node, and return what it printed.

        Raises:
            PartMissing: It is not installed beside `rabbitmq-server`.
            subprocess.CalledProcessError: It failed.
        """
        program = installed_server()
        if program is None:
            raise PartMissing(MISSING)
        record = records.read(self._record)
        account = unprivileged()
        done = subprocess.run(
            [program.with_name("rabbitmqctl"), *words],
            env=self._environment(Path(record["home"]), record),
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            **(account.popen_arguments() if account else {}),
        )
        return done.stdout

    def purge(self) -> None:
        """Stop the node and delete its data."""
        self.stop()
        home = records.read(self._record).get("home")
        if home and Path(home) != self._folder:
            shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _process(self, name: str) -> Process | None:
        process = Process.from_json(records.read(self._record).get(name))
        return process if process and process.is_running() else None

    def _configure(self, home: Path, record: dict[str, Any], account: Account | None) -> dict[str, str]:
        """Write the node's configuration and return the environment of its programs."""
        node = home / "node"
        node.mkdir(mode=0o700, exist_ok=True)
        ports = record["ports"]
        files = {
            ".erlang.cookie": record["cookie"],
            "enabled_plugins": "[rabbitmq_management].\n",
            "rabbitmq.conf": "\n".join(
                (
                    f"listeners.tcp.1 = 127.0.0.1:{ports['amqp']}",
                    "management.tcp.ip = 127.0.0.1",
                    f"management.tcp.port = {ports['management']}",
                    f"default_user = {ADMIN}",
                    f"default_pass = {record['password']}",
                    "default_user_tags.administrator = true",
                    "log.console = true",
                    "log.console.level = info",
                    "log.file = false",
                    "",
                )
            ),
        }
        for name, text in files.items():
            path = node / name
            path.unlink(missing_ok=True)
            records.write_private(path, text)
            path.chmod(0o400 if name == ".erlang.cookie" else 0o600)
            if account:
                account.own(path)
        if account:
            account.own(node)
        return self._environment(home, record)

    def _environment(self, home: Path, record: dict[str, Any]) -> dict[str, str]:
        """What tells RabbitMQ's programs which node they are, or talk to."""
        node, ports = home / "node", record["ports"]
        # The name of the node is part of its data folder; it must not change with the ports.
        name = hashlib.sha256(bytes(self._folder.resolve())).hexdigest()[:10]
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(node),
            "ERL_EPMD_PORT": str(ports["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"taskmesh-{name}@localhost",
            "RABBITMQ_DIST_PORT": str(ports["distribution"]),
            "RABBITMQ_CONF_ENV_FILE": str(node / "no-environment"),
            "RABBITMQ_CONFIG_FILE": str(node / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(node / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(node / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(node / "mnesia"),
            "RABBITMQ_LOG_BASE": str(node / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(node / "config"),
            "RABBITMQ_PID_FILE": str(node / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # Makes the start script become the node instead of waiting for it: the pid we know is the node's.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _start_epmd(self, port: int, environment: dict[str, str], account: Account | None) -> Process:
        """Erlang's port mapper, run by us: the one a node starts by itself would stay behind."""
        epmd = shutil.which("epmd")
        if epmd is None:
            raise PartMissing("epmd, a part of Erlang, was not found: run `apt-get install erlang-base` and try again.")
        return spawn(
            [epmd, "-port", str(port), "-address", "127.0.0.1"],
            log=self._folder / "epmd.log",
            environment=environment,
            folder=Path("/"),
            account=account,
        )

    def _stop_epmd(self) -> None:
        if epmd := self._process("epmd"):
            epmd.stop(5, signal.SIGTERM)

    def _wait_until_ready(self) -> bool:
        """True when the node takes connections and management calls; False when it has ended."""
        deadline = time.monotonic() + START_SECONDS
        while self.is_running():
            if is_answering(self.amqp_url, self.management_url):
                return True
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"RabbitMQ did not answer within {START_SECONDS:.0f} s; see {self.log}")
            time.sleep(0.1)
        return False


class GivenRabbitMQ:
    """A server that somebody else runs; its management URL must be an administrator's."""

    def __init__(self, amqp_url: str, management_url: str) -> None:
        self.amqp_url = amqp_url
        self.management_url = management_url

    def start(self) -> None:
        """Check that the server answers.

        Raises:
            PartDidNotStart: It does not.
        """
        if not self.is_running():
            raise PartDidNotStart("RabbitMQ at TASKMESH_AMQP_URL and TASKMESH_MANAGEMENT_URL does not answer.")

    def is_running(self) -> bool:
        """True if the server answers now."""
        return is_answering(self.amqp_url, self.management_url)


class DockerRabbitMQ:
    """A RabbitMQ container that stays when we end, with its data in a volume of the same name."""

    IMAGE = "rabbitmq:4-management"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = folder / "rabbitmq-container.json"

    @property
    def amqp_url(self) -> str:
        record = records.read(self._record)
        return f"amqp://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['amqp']}/%2F"

    @property
    def management_url(self) -> str:
        record = records.read(self._record)
        return f"http://{ADMIN}:{record['password']}@127.0.0.1:{record['ports']['management']}"

    @property
    def name(self) -> str:
        return f"taskmesh-{hashlib.sha256(bytes(self._folder.resolve())).hexdigest()[:10]}"

    def start(self) -> None:
        """Start the container unless it runs already, and return when the broker answers.

        Raises:
            PartDidNotStart: It did not answer within two minutes.
        """
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        if self._records_a_container() and self.is_running():
            return
        record = records.read(self._record)
        record.setdefault("password", secrets.token_urlsafe(24))
        record.setdefault("ports", {"amqp": free_port(), "management": free_port()})
        records.write(self._record, record)
        # Testcontainers' reaper removes what its process has started when that process ends; ours must stay.
        testcontainers_config.ryuk_disabled = True
        container = (
            DockerContainer(self.IMAGE)
            .with_name(self.name)
            # The hostname is part of the data folder's name: it must not change from start to start.
            .with_kwargs(hostname=self.name, remove=True)
            .with_volume_mapping(self.name, "/var/lib/rabbitmq", "rw")
            .with_env("RABBITMQ_DEFAULT_USER", ADMIN)
            .with_env("RABBITMQ_DEFAULT_PASS", record["password"])
        )
        # A pair of address and port is what Docker's own API takes; testcontainers' type does not say so.
        addresses: dict[Any, Any] = {
            5672: ("127.0.0.1", record["ports"]["amqp"]),
            15672: ("127.0.0.1", record["ports"]["management"]),
        }
        container.ports = addresses
        container.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.is_running():
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"RabbitMQ did not answer; see `docker logs {self.name}`")
            time.sleep(0.5)

    def is_running(self) -> bool:
        return self._records_a_container() and is_answering(self.amqp_url, self.management_url)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """Stop the container; the data stays in its volume."""
        if container := self._container():
            container.stop(timeout=int(timeout_seconds))

    def kill(self) -> None:
        """Kill the broker as a crash would."""
        if container := self._container():
            container.kill()

    def purge(self) -> None:
        """Stop the container and delete its data."""
        self.stop()
        if docker := _docker():
            with contextlib.suppress(Exception):
                docker.volumes.get(self.name).remove(force=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _records_a_container(self) -> bool:
        return "ports" in records.read(self._record)

    def _container(self) -> Any:  # The docker package has no types.
        docker = _docker()
        found = docker.containers.list(filters={"name": f"^{self.name}$"}) if docker else []
        return found[0] if found else None


MISSING = (
    "RabbitMQ was not found: run `apt-get install rabbitmq-server`, start Docker, or set TASKMESH_AMQP_URL and"
    " TASKMESH_MANAGEMENT_URL to a running server; then try again."
)


def find(folder: Path, *, say: Callable[[str], None], install: bool = True) -> RabbitMQ | DockerRabbitMQ:
    """The best broker this machine can run: an installed server, else Docker, else one from the package manager.

    Raises:
        PartMissing: None of these, in one line that says what to do.
    """
    if installed_server():
        return RabbitMQ(folder)
    if _docker():
        say("RabbitMQ is not installed; using Docker")
        return DockerRabbitMQ(folder)
    if install:
        packages.install("rabbitmq-server", say=say)
        if installed_server():
            return RabbitMQ(folder)
    raise PartMissing(MISSING)


def installed_server() -> Path | None:
    """RabbitMQ's own start script. Debian's wrapper of the same name insists on root and on the account `rabbitmq`."""
    candidates = [
        *([Path(given) / "rabbitmq-server"] if (given := os.environ.get("TASKMESH_RABBITMQ_BIN")) else []),
        Path("/usr/lib/rabbitmq/bin/rabbitmq-server"),
        *([Path(found)] if (found := shutil.which("rabbitmq-server")) else []),
    ]
    return next((path for path in candidates if path.exists()), None)


def is_answering(amqp_url: str, management_url: str) -> bool:
    """True if the broker takes a connection and its management API answers."""
    try:
        # The management API first: it says nothing when it is not there, where pika logs each refusal as an error.
        with Management(management_url, timeout_seconds=5) as management:
            management.overview()
        parameters = pika.URLParameters(amqp_url)
        parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = 5
        pika.BlockingConnection(parameters).close()
    except (AMQPError, OSError, TaskmeshError):
        return False
    return True


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


def _ports(known: dict[str, int]) -> dict[str, int]:
    ports: dict[str, int] = {}
    for name in ("amqp", "management", "distribution", "epmd"):
        port = known.get(name)
        ports[name] = port if port and is_free(port) else free_port(taken=ports.values())
    return ports


def _docker() -> Any:  # The docker package has no types.
    """A client of the Docker daemon; None if none answers."""
    with contextlib.suppress(Exception):
        import docker

        client = docker.from_env(timeout=5)
        client.ping()
        return client
    return None
