"""A private RabbitMQ node."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from taskmesh.parts import PartDidNotStart, records
from taskmesh.parts.accounts import Account, data_folder, unprivileged
from taskmesh.parts.ports import free_port, is_free
from taskmesh.parts.processes import Process, log_end, spawn
from taskmesh.parts.rabbitmq import programs
from taskmesh.parts.rabbitmq.given import is_answering
from taskmesh.parts.rabbitmq.programs import Command, Programs

ADMIN = "taskmesh_admin"
START_SECONDS = 120.0
STOP_SECONDS = 40.0


class RabbitMQ:
    """A RabbitMQ node of our own, started from the installed `rabbitmq-server` or, asked for another, an unpacked one.

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
            PartMissing: There is no `rabbitmq-server`, or none of the release that `TASKMESH_RABBITMQ` asks for.
            PartDidNotStart: The node ended at once, or did not answer within two minutes; or its data is that of
                another release than the one that is asked for.
        """
        if self.is_running() and self._wait_until_ready():
            return
        program = self._programs()
        program.prepare()
        account = unprivileged()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stop_epmd()
        home = data_folder(self._folder, account)
        record = records.read(self._record)
        record.setdefault("password", secrets.token_urlsafe(24))
        record.setdefault("cookie", secrets.token_hex(20))
        record |= {"home": str(home), "series": program.series}
        node = home / "node"
        for _ in range(3):
            record["ports"] = _ports(record.get("ports", {}))
            records.write(self._record, record)
            self._configure(node, record, account)
            environment = self._environment(program.place(node), record["ports"])
            # Erlang's port mapper is run by us: the one a node starts by itself would stay behind.
            words = ("-port", str(record["ports"]["epmd"]), "-address", "127.0.0.1")
            epmd = program.command("epmd", *words, node=node, account=account)
            record["epmd"] = self._spawn(epmd, "epmd", environment).to_json()
            server = program.command("rabbitmq-server", node=node, account=account)
            process = self._spawn(server, "rabbitmq", environment)
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
            PartMissing: The node's release is not there any more.
            subprocess.CalledProcessError: It failed.
        """
        record = records.read(self._record)
        program = self._programs()
        node = Path(record["home"]) / "node"
        command = program.command("rabbitmqctl", *words, node=node, account=unprivileged())
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command.words,
            env=self._environment(program.place(node), record["ports"]),
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            **(command.account.popen_arguments() if command.account else {}),
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

    def _programs(self) -> Programs:
        """The programs of the release the node has always had, or of the one that is asked for."""
        known, wanted = records.read(self._record).get("series"), programs.wanted()
        if known and wanted and known != wanted:
            raise PartDidNotStart(
                f"{self._folder} holds the data of a RabbitMQ {known}, which a RabbitMQ {wanted} cannot take over:"
                f" delete it (`make down purge=1`), or go on with {known}."
            )
        found = programs.of(wanted or known) or (None if wanted else programs.of(None))
        if found is None:
            raise programs.missing(wanted)
        return found

    def _spawn(self, command: Command, name: str, environment: dict[str, str]) -> Process:
        log = self._folder / f"{name}.log"
        return spawn(command.words, log=log, environment=environment, folder=Path("/"), account=command.account)

    def _configure(self, node: Path, record: dict[str, Any], account: Account | None) -> None:
        """Write the node's configuration."""
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

    def _environment(self, node: Path, ports: dict[str, int]) -> dict[str, str]:
        """What tells RabbitMQ's programs which node they are, or talk to."""
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
            "ERL_CRASH_DUMP": str(node / "erl_crash.dump"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # Makes the start script become the node instead of waiting for it: the pid we know is the node's.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

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


def _ports(known: dict[str, int]) -> dict[str, int]:
    ports: dict[str, int] = {}
    for name in ("amqp", "management", "distribution", "epmd"):
        port = known.get(name)
        ports[name] = port if port and is_free(port) else free_port(taken=ports.values())
    return ports
