"""The programs of a RabbitMQ release: those of the machine, or those in a root folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from taskmesh.parts import PartMissing
from taskmesh.parts.accounts import Account
from taskmesh.parts.rabbitmq import root

RELEASE_VARIABLE = "TASKMESH_RABBITMQ"
"""Asks for a release series, such as `4`."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and the account to start it as; None is our own."""

    words: list[str]
    account: Account | None


class Programs(Protocol):
    """A way to run RabbitMQ's programs for the node in one folder."""

    @property
    def series(self) -> str:
        """The first number of the release."""
        ...

    def prepare(self) -> None:
        """Make sure that the programs are there."""
        ...

    def place(self, node: Path) -> Path:
        """Where the programs find the node's folder."""
        ...

    def command(self, name: str, *arguments: str, node: Path, account: Account | None) -> Command:
        """What runs a program, in the end as the account."""
        ...


@dataclass(frozen=True, slots=True)
class Installed:
    """The programs of the machine, beside its `rabbitmq-server`."""

    server: Path

    @property
    def series(self) -> str:
        # Nearly every release lies in a folder named for it; asking it takes half a second.
        named = re.search(r"rabbitmq(?:_server-|/)(\d+)\.\d+", str(self.server.resolve()))
        if named:
            return named.group(1)
        asked = [str(self.server.with_name("rabbitmqctl")), "version"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        return answer.partition(".")[0].strip()

    def prepare(self) -> None:
        """Nothing: they are there."""

    def place(self, node: Path) -> Path:
        return node

    def command(self, name: str, *arguments: str, node: Path, account: Account | None) -> Command:  # noqa: ARG002
        program = shutil.which(name) if name == "epmd" else str(self.server.with_name(name))
        if program is None:
            raise PartMissing("epmd, a part of Erlang, was not found: run `apt-get install erlang-base` and try again.")
        return Command([program, *arguments], account)


class Unpacked:
    """The programs in the root folder of `taskmesh.parts.rabbitmq.root`.

    Each runs in a mount namespace of its own, where the root has the machine's /proc and /dev and the node's folder. It
    shares the network, and its pid is the one that was started, so it is stopped and killed like any other process.
    """

    series = root.SERIES
    ENTER = (
        "set -e; root=$1; node=$2; shift 2;"
        ' mount --rbind /proc "$root/proc"; mount --rbind /dev "$root/dev";'
        f' mount --bind "$node" "$root{root.NODE}";'
        ' exec chroot "$root" env PATH=/usr/sbin:/usr/bin "$@"'
    )

    def prepare(self) -> None:
        """Make the root.

        Raises:
            PartMissing: It cannot be made, or not be entered.
        """
        root.make()
        entered = subprocess.run([*self._unshare(), "true"], capture_output=True, text=True, check=False)
        if entered.returncode != 0:
            raise PartMissing(
                f"RabbitMQ {self.series} runs in a folder of its own, which takes the right to mount: be root (in a"
                f" container with CAP_SYS_ADMIN), or allow user namespaces. `unshare` said: {entered.stderr.strip()}"
            )

    def place(self, node: Path) -> Path:  # noqa: ARG002
        return root.NODE

    def command(self, name: str, *arguments: str, node: Path, account: Account | None) -> Command:
        become: list[str] = []
        if account:
            become = ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups"]
        program = "/usr/bin/epmd" if name == "epmd" else str(root.SERVER.with_name(name))
        enter = ["sh", "-c", self.ENTER, "sh", str(root.folder()), str(node)]
        # Only who may mount can enter, so the account is taken on inside.
        return Command([*self._unshare(), *enter, *become, program, *arguments], account=None)

    def _unshare(self) -> list[str]:
        if not shutil.which("unshare"):
            raise PartMissing("unshare was not found: run `apt-get install util-linux` and try again.")
        return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def wanted() -> str | None:
    """The release series that `RELEASE_VARIABLE` asks for."""
    return os.environ.get(RELEASE_VARIABLE) or None


def of(series: str | None) -> Programs | None:
    """The programs of a release series; of whatever release is installed if it does not matter."""
    server = installed_server()
    if server:
        installed = Installed(server)
        if series is None or installed.series == series:
            return installed
    return Unpacked() if series == root.SERIES else None


def missing(series: str | None = None) -> PartMissing:
    """The error that says how to come by a RabbitMQ."""
    way_out = "or set TASKMESH_AMQP_URL and TASKMESH_MANAGEMENT_URL to a running server; then try again."
    if series is not None:
        return PartMissing(f"RabbitMQ {series} was not found: install it, {way_out}")
    return PartMissing(f"RabbitMQ was not found: run `apt-get install rabbitmq-server`, start Docker, {way_out}")


def installed_server() -> Path | None:
    """RabbitMQ's own start script. Debian's wrapper of the same name insists on root and on the account `rabbitmq`."""
    candidates = [
        *([Path(given) / "rabbitmq-server"] if (given := os.environ.get("TASKMESH_RABBITMQ_BIN")) else []),
        Path("/usr/lib/rabbitmq/bin/rabbitmq-server"),
        *([Path(found)] if (found := shutil.which("rabbitmq-server")) else []),
    ]
    return next((path for path in candidates if path.exists()), None)
