"""A root folder with RabbitMQ 4, made once per user: Debian 12's own RabbitMQ is 3.10.

The folder holds Debian 13's packages, unpacked by the machine's apt and dpkg and checked against Debian's keys. Nothing
is installed on the machine, and no right but the user's own is needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from taskmesh.parts import PartMissing

SERIES = "4"
SUITE = "trixie"
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
NODE = Path("/node")
"""Where the folder of a node appears below the root."""
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
# What no program reads, and half of the size.
SPARE = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/zoneinfo")


def folder() -> Path:
    """Where the root is once it is made."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "taskmesh" / f"rabbitmq-{SERIES}"


def make() -> Path:
    """The root, made if it is not there yet; a second maker waits for the first, and half-made ones are thrown away.

    Raises:
        PartMissing: Something that making it takes is missing or failed, with its last words.
    """
    root = folder()
    if root.exists():
        return root
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if not shutil.which(tool):
            raise PartMissing(f"RabbitMQ {SERIES} is unpacked from Debian's packages, which takes {package}. {_GIVEN}")
    if not KEYS.exists():
        raise PartMissing(f"{KEYS} is missing: run `apt-get install debian-archive-keyring` and try again.")
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            draft = root.with_name(f"{root.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            try:
                _fill(draft)
                draft.rename(root)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return root


_GIVEN = "A running server can be named instead: see docs/rabbitmq.md."


def _fill(root: Path) -> None:
    root.mkdir(mode=0o755)
    with tempfile.TemporaryDirectory(prefix="taskmesh-apt-") as scratch:
        # base-files first: it makes /bin and its like the links that the others unpack through.
        packages = sorted(_download(Path(scratch)), key=lambda path: not path.name.startswith("base-files_"))
        for package in packages:
            _run("dpkg-deb", "--extract", str(package), str(root))
    for name in SPARE:
        shutil.rmtree(root / name, ignore_errors=True)
    (root / NODE.relative_to("/")).mkdir()
    # The node's name ends in `localhost`, which has to be an address.
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    if not (root / SERVER.relative_to("/")).exists():
        raise PartMissing(f"Debian's {SUITE} brought no RabbitMQ. {_GIVEN}")


def _download(scratch: Path) -> list[Path]:
    """Fetch the server and all it needs, with an apt whose state is in `scratch` alone."""
    (scratch / "lists/partial").mkdir(parents=True)
    (scratch / "cache/archives/partial").mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources.list").write_text(f"deb [signed-by={KEYS}] {_mirror()} {SUITE} main\n")
    options = {
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": scratch,
        "Dir::State::lists": scratch / "lists",
        "Dir::State::status": scratch / "status",
        "Dir::Cache": scratch / "cache",
        "Acquire::Languages": "none",
        "APT::Install-Recommends": "false",
        # apt's own account could not write to a folder of ours.
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
    }
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in options.items() if value)]
    _run(*apt, "update")
    _run(*apt, "--download-only", "install", "?essential", "base-files", "rabbitmq-server")
    return list((scratch / "cache/archives").glob("*.deb"))


def _mirror() -> str:
    """The place the machine's own apt takes Debian from, if it does."""
    asked = ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    known = [line.rstrip("/") for line in _run(*asked).splitlines()]
    return next((uri for uri in known if uri.endswith("/debian")), MIRROR)


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join(done.stdout.splitlines()[-8:])
        raise PartMissing(f"RabbitMQ {SERIES} could not be unpacked: {command[0]} failed. {_GIVEN} It said:\n{said}")
    return done.stdout
