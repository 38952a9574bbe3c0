"""`make traces`: a thousand requests through the demo's flow, and whether each has left one whole trace.

The thirty requests of the demo are sent again and again, those that must be refused among them, each under a key of
its own. When all have ended, the trace page is asked for the trace of each.
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import cycle, islice
from typing import Any
from uuid import UUID

import httpx
from rich.console import Console

from taskmesh.client import InvalidRequest, Task, Taskmesh
from taskmesh.contracts.billing import IssueInvoice
from taskmesh_local import demo_invoices, wholeness
from taskmesh_local.wholeness import Comparison, Seen

REQUESTS = 1000
CALLERS = 4
POLL_SECONDS = 2.0
# Spans leave a process five seconds after they ended, at the latest.
TRACES_SECONDS = 30.0
PATIENCE_SECONDS = 60.0
SHOWN = 20


def main(words: Sequence[str], console: Console) -> int:
    """Send the requests to the mesh that the environment describes; 0 when every trace is whole."""
    parser = argparse.ArgumentParser(prog="make traces", description="Send requests, and check the trace of each.")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help="how many")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="how long they may take")
    options = parser.parse_args(list(words))
    begun = time.monotonic()
    with Taskmesh.from_env(timeout=PATIENCE_SECONDS) as mesh, httpx.Client(timeout=30, trust_env=False) as page:
        since = datetime.now(UTC) - timedelta(seconds=1)
        with ThreadPoolExecutor(CALLERS) as callers:
            sent = dict(callers.map(lambda body: _send(mesh, body), islice(_bodies(), options.requests)))
        console.print(f"{len(sent)} requests sent in {time.monotonic() - begun:.0f} s", highlight=False)
        kinds = {trace_id: answer for trace_id, answer in sent.items() if isinstance(answer, str)}
        roots = {answer: trace_id for trace_id, answer in sent.items() if isinstance(answer, UUID)}
        kinds |= _outcomes(mesh, roots, since, seconds=options.timeout)
        console.print(f"all have ended after {time.monotonic() - begun:.0f} s", highlight=False)
        found = _compare(page, kinds)
    _tell(console, found, len(kinds))
    return 0 if len(kinds) == options.requests and not found.broken else 1


def _bodies() -> Iterator[Mapping[str, Any]]:
    """The payloads of the demo, for ever."""
    good = [invoice.model_dump(mode="json") for invoice in demo_invoices.good()]
    return cycle([*good, *(mistake.payload for mistake in demo_invoices.bad())])


def _send(mesh: Taskmesh, payload: Mapping[str, Any]) -> tuple[str, UUID | str]:
    """The trace of one request, and its task, or in words how it was refused."""
    try:
        task = mesh.submit(IssueInvoice.type_name, payload, idempotency_key=f"traces-{secrets.token_hex(8)}")
    except InvalidRequest as problem:
        return str(problem.trace_id), f"refused: {problem.code}"
    return str(task.trace_id), task.id


def _outcomes(mesh: Taskmesh, roots: Mapping[UUID, str], since: datetime, *, seconds: float) -> dict[str, str]:
    """How each request has ended, by its trace: the tasks that it has become, with their states and attempts.

    Raises:
        TimeoutError: Not all of them have ended in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        trees: dict[UUID, list[Task]] = defaultdict(list)
        for task in mesh.list(created_after=since, page_size=200):
            root = task.root_id or task.id
            if root in roots:
                trees[root].append(task)
        # A task tells of those that it has started in the message that tells of its own end.
        if len(trees) == len(roots) and all(task.finished for tree in trees.values() for task in tree):
            return {roots[root]: _words(tree) for root, tree in trees.items()}
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all requests have ended within {seconds:g} s; `make status` shows what is down")
        time.sleep(POLL_SECONDS)


def _words(tree: Sequence[Task]) -> str:
    told = sorted(f"{task.type} {task.state} after {task.attempt}" for task in tree)
    return ", ".join(told)


def _compare(page: httpx.Client, kinds: Mapping[str, str]) -> Comparison:
    """The traces as the page has them, whole if they come in time."""
    deadline = time.monotonic() + TRACES_SECONDS
    traces: dict[str, Sequence[Seen]] = {}
    wanted = set(kinds)
    while True:
        for trace_id in wanted:
            answer = page.get(f"{os.environ['TASKMESH_TRACES_URL']}/api/traces/{trace_id}")
            if answer.status_code == httpx.codes.OK:
                traces[trace_id] = [Seen.from_json(span) for span in answer.json()["spans"]]
        found = wholeness.compare(traces, kinds)
        if not found.broken or time.monotonic() > deadline:
            return found
        # Those alone can still change that lack something, or that had set a shape which they lack.
        wanted = set(found.broken)
        time.sleep(POLL_SECONDS)


def _tell(console: Console, found: Comparison, count: int) -> None:
    for kind, shape in found.shapes.items():
        spans = sum(number for _, number in shape)
        console.print(
            f"{found.kinds[kind]:6} with {spans} spans: {kind}", highlight=False, markup=False, soft_wrap=True
        )
    for trace_id, faults in list(found.broken.items())[:SHOWN]:
        console.print(f"{trace_id}: {'; '.join(faults)}", highlight=False, markup=False, soft_wrap=True)
    whole = "each whole" if not found.broken else f"{len(found.broken)} of them broken"
    console.print(f"{count:,} traces, {whole}, {found.shape_count} shapes", highlight=False)
