"""The machine's package manager, for what no Python package brings."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from taskmesh.parts import PartMissing

POLICY = Path("/usr/sbin/policy-rc.d")


def install(package: str, *, say: Callable[[str], None]) -> None:
    """Install a Debian package. A person at the terminal is asked first.

    A service that the package would start by itself, on the default port, is not started.

    Raises:
        PartMissing: There is no apt, no right to use it, the person said no, or it failed.
    """
    what_to_do = f"install it yourself (`apt-get install {package}`) and try again."
    if not shutil.which("apt-get"):
        raise PartMissing(f"{package} is not installed and there is no apt-get: {what_to_do}")
    as_root = _as_root()
    if as_root is None:
        raise PartMissing(f"{package} is not installed, and only root may: {what_to_do}")
    if sys.stdin.isatty() and sys.stdout.isatty():
        answer = input(f"{package} is not installed. Install it now with apt-get? [Y/n] ")
        if answer.strip().lower() not in {"", "y", "yes"}:
            raise PartMissing(f"{package} is needed: {what_to_do}")
    say(f"installing {package} (apt-get)")
    with _services_held_back(as_root):
        _run([*as_root, "apt-get", "update", "-qq"])
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        answer_code = _run([*as_root, "env", "DEBIAN_FRONTEND=noninteractive", *command])
    if answer_code != 0:
        raise PartMissing(f"apt-get could not install {package} (see its output above): {what_to_do}")


@contextlib.contextmanager
def _services_held_back(as_root: list[str]) -> Iterator[None]:
    """While it is entered, packages do not start their services: `policy-rc.d` says no to all of them."""
    if POLICY.exists():
        yield
        return
    with tempfile.NamedTemporaryFile("w", suffix=".policy") as draft:
        draft.write("#!/bin/sh\nexit 101\n")
        draft.flush()
        made = _run([*as_root, "install", "-m", "755", draft.name, str(POLICY)]) == 0
    try:
        yield
    finally:
        if made:
            _run([*as_root, "rm", "-f", str(POLICY)])


def _as_root() -> list[str] | None:
    """The words before a command that make it run as root; None if that cannot be done without asking a password."""
    if os.geteuid() == 0:
        return []
    if not shutil.which("sudo"):
        return None
    interactive = sys.stdin.isatty()
    if not interactive and _run(["sudo", "-n", "true"]) != 0:
        return None
    return ["sudo"] if interactive else ["sudo", "-n"]


def _run(command: list[str]) -> int:
    # apt's own chatter goes to stderr: stdout may be read by a program.
    return subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
