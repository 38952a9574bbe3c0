"""`python -m taskmesh_local costs`: what one task costs each part of the mesh, for the sums of docs/scaling.md.

Needs the mesh that `make up` has started, and nobody else who uses it. Time on a CPU, bytes and rows are counted, not
elapsed time, so a busy machine hardly changes them; what the mesh uses while nothing happens is taken off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import quote

import httpx
import psycopg
from rich.console import Console

from taskmesh.client import AsyncTaskmesh
from taskmesh.client.operations import Submission
from taskmesh.contracts.billing import Buyer, InvoiceLine, IssueInvoice, Tax
from taskmesh.contracts.email import Recipient, SendMessage
from taskmesh.errors import TaskmeshError
from taskmesh.parts import PartMissing
from taskmesh.planning.costs import MEASURED, Costs
from taskmesh_local import ceilings, environment
from taskmesh_local.folders import Folders
from taskmesh_local.roles import PACKAGES, ROLE_NAMES
from taskmesh_local.state import State

IDLE_SECONDS = 15.0
SETTLE_SECONDS = 6.0
"""The management API's figures are up to five seconds old."""
PATIENCE_SECONDS = 3600.0
AT_ONCE = 16
TICKS = os.sysconf("SC_CLK_TCK")
BATCH = 500


def _mail(number: int) -> Submission:
    to = Recipient(address=f"measured-{number}@example.org")
    return Submission.of(SendMessage(to=to, subject="Measured", text="One of many."))


def _invoice(number: int) -> Submission:
    buyer = Buyer(name=f"Buyer {number}", address=("1 Road",), country="GB", email=f"b{number}@example.org")
    line = InvoiceLine(description="Measured", unit_price="10.00", tax=Tax(rate="19"))
    return Submission.of(IssueInvoice(buyer=buyer, currency="EUR", lines=(line,)))


KINDS: Mapping[str, tuple[Callable[[int], Submission], int]] = {
    "mail": (_mail, 1),
    "mail_in_batches": (_mail, BATCH),
    "invoice": (_invoice, 1),
}
"""What is submitted, and how many of them with one request."""


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads what the parts of a running mesh have used since they started."""

    variables: Mapping[str, str]
    processes: Mapping[str, int]

    @classmethod
    def of(cls, folders: Folders) -> Meter:
        state = State.load(folders)
        if missing := [name for name in ROLE_NAMES if name not in state.processes]:
            raise PartMissing(f"The mesh is not up: {', '.join(missing)} never started. `make up` starts it.")
        processes = {name: state.processes[name]["pid"] for name in ROLE_NAMES}
        for part in ("postgres", "rabbitmq"):
            record = json.loads((folders.root / part / f"{part}.json").read_text())
            processes[part] = record["process"]["pid"]
        return cls(environment.read(folders.env), processes)

    def read(self) -> Counter[str]:
        """Counts under names such as `cpu/gateway-api`, `rows/gateway` and `published/taskmesh.commands`."""
        family = _family()
        seen = Counter({f"cpu/{name}": _cpu_ms(_tree(pid, family)) for name, pid in self.processes.items()})
        [[wal]] = self.query("postgres", "select (pg_current_wal_lsn() - '0/0')::bigint")
        seen["wal"] = wal
        for service in PACKAGES:
            [[commits]] = self.query(
                service, "select xact_commit from pg_stat_database where datname=current_database()"
            )
            [[rows, kept]] = self.query(
                service,
                "select sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint,"
                " sum(case when relname <> 'outbox' then pg_total_relation_size(relid) end)::bigint"
                " from pg_stat_user_tables",
            )
            seen.update({f"commits/{service}": commits, f"rows/{service}": rows, f"kept/{service}": kept})
        vhost = quote(httpx.URL(self.variables["TASKMESH_AMQP_URL"]).path.removeprefix("/") or "/", safe="")
        for exchange in ("commands", "events", "lifecycle", "direct"):
            stats = self.manage(f"exchanges/{vhost}/taskmesh.{exchange}").get("message_stats", {})
            seen[f"published/{exchange}"] = stats.get("publish_in", 0)
        return seen

    def memory_mb(self) -> dict[str, list[float]]:
        """The proportional set size of each process, its children's after its own."""
        family = _family()
        return {
            name: [_pss_mb(each) for each in _tree(pid, family)]
            for name, pid in self.processes.items()
            if name != "postgres"
        }

    def connections(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many connections the database and the broker have, by who keeps them."""
        rows = self.query(
            "postgres",
            "select datname || ': ' || application_name, count(*) from pg_stat_activity"
            " where datname = any(%s) and pid <> pg_backend_pid() group by 1 order by 1",
            list(PACKAGES),
        )
        kept: Counter[str] = Counter()
        for name, count in rows:
            # A pool's connections carry the name of their process.
            kept[re.sub(r"taskmesh-[0-9a-f]+$", "task pool", name)] += count
        return dict(kept), dict(Counter(each["user"] for each in self.manage("connections")))

    def query(self, database: str, statement: LiteralString, *values: Any) -> list[Any]:
        url = self.variables["TASKMESH_POSTGRES_URL"].rpartition("/")[0] + f"/{database}"
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(statement, values).fetchall()

    def manage(self, path: str) -> Any:
        url = httpx.URL(self.variables["TASKMESH_MANAGEMENT_URL"])
        address = f"{url.scheme}://{url.host}:{url.port}/api/{path}"
        answer = httpx.get(address, auth=(url.username, url.password), trust_env=False)
        return answer.raise_for_status().json()


def measure(meter: Meter, kind: str, count: int) -> dict[str, Any]:
    """What one root task of this kind costs, with everything that follows from it."""
    calm_from, calm = time.monotonic(), meter.read()
    time.sleep(IDLE_SECONDS)
    idle_seconds, idle = time.monotonic() - calm_from, meter.read()
    idle.subtract(calm)

    began, before = time.monotonic(), meter.read()
    tag = f"costs-{datetime.now(UTC):%H%M%S}"
    make, together = KINDS[kind]
    asyncio.run(_submit(meter.variables, [make(number) for number in range(count)], tag, together))
    tasks = _wait(meter, tag)
    time.sleep(SETTLE_SECONDS)
    used, seconds = meter.read(), time.monotonic() - began
    used.subtract(before)
    each = {name: (used[name] - idle[name] * seconds / idle_seconds) / count for name in used}
    return {"tasks": tasks / count, **_grouped(each)}


def _grouped(each: Mapping[str, float]) -> dict[str, Any]:
    grouped: dict[str, Any] = {}
    for name, value in sorted(each.items()):
        what, _, of = name.partition("/")
        rounded = round(max(value, 0.0), 3)
        if of:
            grouped.setdefault(what, {})[of] = rounded
        else:
            grouped[what] = rounded
    return grouped


async def _submit(variables: Mapping[str, str], tasks: Sequence[Submission], tag: str, together: int) -> None:
    turns = asyncio.Semaphore(AT_ONCE)
    tagged = [replace(task, tags=[tag]) for task in tasks]
    async with AsyncTaskmesh(variables["TASKMESH_URL"], variables["TASKMESH_API_KEY"], timeout=60.0) as mesh:

        async def submit(some: Sequence[Submission]) -> None:
            async with turns:
                if together == 1:
                    await mesh.submit(some[0].type, some[0].payload, tags=[tag])
                else:
                    await mesh.submit_many(some)

        await asyncio.gather(*(submit(tagged[first : first + together]) for first in range(0, len(tagged), together)))


def _wait(meter: Meter, tag: str) -> int:
    """How many tasks came of it, once nothing has been added or is open for a while."""
    statement: LiteralString = (
        "with roots as (select id from tasks where %s = any(tags))"
        " select count(*), count(*) filter (where finished_at is null) from tasks"
        " where root_id in (select id from roots) or id in (select id from roots)"
    )
    before = (-1, -1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        [found] = meter.query("gateway", statement, tag)
        if tuple(found) == before and found[1] == 0:
            return int(found[0])
        before = tuple(found)
        time.sleep(3.0)
    raise TaskmeshError(f"{before[1]} of {before[0]} tasks have not ended in time. `make status` tells what is down.")


def _family() -> dict[int, list[int]]:
    """The children of each process."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(path)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    return children


def _tree(pid: int, family: Mapping[int, list[int]]) -> list[int]:
    return [pid, *(below for child in family.get(pid, ()) for below in _tree(child, family))]


def _stat(path: Path) -> list[str]:
    """The fields after the program's name; none when the process has just ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_ms(pids: Iterable[int]) -> int:
    """User and system time of these processes and of their children that have ended."""
    ticks = sum(sum(map(int, _stat(Path(f"/proc/{pid}/stat"))[11:15])) for pid in pids)
    return ticks * 1000 // TICKS


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def main(words: Sequence[str], console: Console) -> int:
    """Measure, and print the figures or write them where the model reads them."""
    parser = argparse.ArgumentParser(prog="python -m taskmesh_local costs", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000, help="of each kind; more is more exact")
    parser.add_argument("--write", action="store_true", help=f"replace {MEASURED.name}, which `taskmesh plan` reads")
    options = parser.parse_args(words)
    folders = Folders.find()
    meter = Meter.of(folders)
    asyncio.run(_submit(meter.variables, [make(0) for make, _ in KINDS.values()], "costs-warm", 1))
    _wait(meter, "costs-warm")
    databases, brokers = meter.connections()
    costs = Costs.model_validate(
        {
            "measured_on": datetime.now(UTC).date(),
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "versions": {
                "python": platform.python_version(),
                "postgresql": meter.query("postgres", "show server_version")[0][0],
                "rabbitmq": meter.manage("overview")["rabbitmq_version"],
            },
            "repetitions": options.tasks,
            "kinds": {kind: measure(meter, kind, options.tasks) for kind in KINDS},
            "memory_mb": meter.memory_mb(),
            "database_connections": databases,
            "broker_connections": brokers,
            "commits_per_second": ceilings.commits_per_second(meter.variables["TASKMESH_POSTGRES_URL"]),
        }
    )
    text = costs.model_dump_json(indent=2) + "\n"
    if options.write:
        MEASURED.write_text(text)
        console.print(
            f"Measured, and written to {MEASURED.name}. `make scaling` brings the page up to date.", highlight=False
        )
    else:
        print(text, end="")
    return 0
