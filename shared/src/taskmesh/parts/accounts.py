"""Which account a part runs as, and where that account can keep data.

PostgreSQL refuses to run as root. So a launcher that is root runs the parts as the account `taskmesh`, and keeps their
data where that account can reach it. Nothing about the folders above is changed.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "taskmesh"
# Data goes here when the account cannot reach the project's own folder, for example below /root.
FALLBACK = Path("/var/lib/taskmesh")


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    uid: int
    gid: int

    def popen_arguments(self) -> dict[str, Any]:
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def reaches(self, path: Path) -> bool:
        """True if the account may go through every folder above `path`, which need not exist yet."""
        return all(self._may_enter(folder) for folder in path.absolute().parents if folder.exists())

    def own(self, *paths: Path) -> None:
        """Give the paths to the account."""
        for path in paths:
            os.chown(path, self.uid, self.gid)

    def _may_enter(self, folder: Path) -> bool:
        status = folder.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def unprivileged() -> Account | None:
    """The account that parts run as: None, meaning our own, unless we are root.

    As root, a system account `taskmesh` is made once; where that cannot be done, `nobody` serves.
    """
    if os.geteuid() != 0:
        return None
    for name in (NAME, "nobody"):
        if name == NAME and shutil.which("useradd") and not _exists(name):
            command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", str(FALLBACK)]
            # Two launchers may come here at once: the second one's failure is as good as a success.
            subprocess.run([*command, "--shell", "/usr/sbin/nologin", name], capture_output=True, check=False)
        if _exists(name):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    return None


def data_folder(folder: Path, account: Account | None) -> Path:
    """A folder for a part's data: `folder` itself, or one the account can reach that belongs to `folder` alone."""
    real = folder.resolve()
    if account is None or account.reaches(real / "data"):
        home = folder
    else:
        home = FALLBACK / f"{folder.name}-{hashlib.sha256(bytes(real)).hexdigest()[:12]}"
    home.mkdir(parents=True, exist_ok=True)
    if account is not None and home != folder:
        # 0755 below /var/lib: others may pass through; the data folder inside is the account's alone.
        FALLBACK.chmod(0o755)
        home.chmod(0o755)
    return home


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
