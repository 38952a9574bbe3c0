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
        PartMissing: There is no apt, no right to use it, the person said no, or it failed, with its last words.
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
    say(f"installing {package} (apt-get; this takes a minute)")
    with _services_held_back(as_root):
        # An outdated list may still do; if not, the installation says so.
        _run([*as_root, "apt-get", "update", "-qq"])
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        installed = _run([*as_root, "env", "DEBIAN_FRONTEND=noninteractive", *command])
    if installed.returncode != 0:
        said = "\n".join(installed.stdout.splitlines()[-8:])
        raise PartMissing(f"apt-get could not install {package}: {what_to_do} It said:\n{said}")


@contextlib.contextmanager
def _services_held_back(as_root: list[str]) -> Iterator[None]:
    """While it is entered, packages do not start their services: `policy-rc.d` says no to all of them."""
    if POLICY.exists():
        yield
        return
    with tempfile.NamedTemporaryFile("w", suffix=".policy") as draft:
        draft.write("#!/bin/sh\nexit 101\n")
        draft.flush()
        made = _run([*as_root, "install", "-m", "755", draft.name, str(POLICY)]).returncode == 0
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
    if not interactive and _run(["sudo", "-n", "true"]).returncode != 0:
        return None
    return ["sudo"] if interactive else ["sudo", "-n"]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # sudo asks for a password at the terminal itself; everything else that these say is noise unless they fail.
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
