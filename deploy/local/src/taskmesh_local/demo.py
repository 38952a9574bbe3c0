"""`make demo`: thirty invoices through the whole mesh, watched until the last mail is in the inbox.

Everything goes over HTTP, through the Python client that any other program would use. Killing and restarting any
process meanwhile makes the demo slower and nothing else.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from taskmesh.client import ClientError, InvalidRequest, Task, Taskmesh, TaskmeshProblem
from taskmesh.contracts.billing import DocumentReady, IssueInvoice, RenderDocument
from taskmesh.money import to_major
from taskmesh_local import demo_invoices
from taskmesh_local.demo_invoices import Mistake

POLL_SECONDS = 0.5
# A restart of the gateway or its database takes some seconds; the client goes on trying for this long.
PATIENCE_SECONDS = 60.0
# Spans are exported some seconds after they end.
TRACES_SECONDS = 15.0
INVOICES = 30
LINE_EACH = 10
# Where no terminal tells its width, no column is cut.
FILE_WIDTH = 200
# Between the five columns of the table of invoices.
GAPS = 4 * 3
STEPS = ("submitted", "issued", "rendered", "mailed")
URLS = ("TASKMESH_URL", "TASKMESH_API_KEY", "TASKMESH_INBOX_URL", "TASKMESH_TRACES_URL")


@dataclass(slots=True)
class Order:
    """One good invoice on its way."""

    invoice: IssueInvoice
    task: Task
    tree: dict[str, Task] = field(default_factory=dict)
    """The tasks that followed, by their type."""
    mails: list[dict[str, Any]] = field(default_factory=list)

    @property
    def issued(self) -> bool:
        return self._succeeded(IssueInvoice.type_name)

    @property
    def rendered(self) -> bool:
        return self._succeeded(RenderDocument.type_name)

    @property
    def mailed(self) -> bool:
        return bool(self.mails) and self._succeeded(DocumentReady.type_name)

    @property
    def failure(self) -> Task | None:
        """A task that ended without success."""
        return next((task for task in self.tree.values() if task.finished and not task.succeeded), None)

    @property
    def number(self) -> str:
        result = self.tree[IssueInvoice.type_name].result
        return str(result["number"])

    @property
    def total(self) -> str:
        money = self.tree[IssueInvoice.type_name].result["total"]
        return f"{to_major(money['amount_minor'], money['currency']):,} {money['currency']}"

    @property
    def mail_key(self) -> str | None:
        """What the Message-ID of its mail begins with."""
        task = self.tree.get(DocumentReady.type_name)
        return str(task.result["message_id"]) if task and task.succeeded else None

    def _succeeded(self, type_name: str) -> bool:
        task = self.tree.get(type_name)
        return task is not None and task.succeeded


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the gateway said to an invoice that must not be."""

    mistake: Mistake
    problem: TaskmeshProblem | None

    @property
    def right(self) -> bool:
        """Whether it was refused for its payload, and at the right field."""
        return isinstance(self.problem, InvalidRequest) and self.mistake.pointer in {
            error.pointer for error in self.problem.errors
        }


class Unfinished(Exception):
    """Something is missing; the message says what."""


def main(arguments: Sequence[str]) -> int:
    """Run the demo against the mesh that the environment describes; 0 when nothing is missing."""
    parser = argparse.ArgumentParser(prog="make demo", description="Send thirty invoices through the mesh.")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait for the mails"
    )
    options = parser.parse_args(list(arguments))
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    missing = [name for name in URLS if not os.environ.get(name)]
    if missing:
        _complain(f"{missing[0]} is not set: start the mesh with `make up`, then `. .taskmesh/env`")
        return 2
    begun = time.monotonic()
    try:
        with Taskmesh.from_env(timeout=PATIENCE_SECONDS) as mesh, httpx.Client(timeout=10) as pages:
            with _progress(console) as show:
                orders, refusals = _submit(mesh, show)
                _watch(mesh, pages, orders, show, seconds=options.timeout)
            took = time.monotonic() - begun
            traces = _find_traces(pages, orders)
    except (ClientError, Unfinished) as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted; what was submitted goes on")
        return 130
    _summarize(console, orders, refusals, traces, timedelta(seconds=took))
    accepted = [refusal.mistake.what for refusal in refusals if not refusal.right]
    if accepted:
        _complain(f"not refused as it should be: {', '.join(accepted)}")
    return 1 if accepted else 0


class Show:
    """Counts how far the invoices are: bars on a terminal, a line for each change elsewhere."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console = console
        self._bars = bars
        self._counts = dict.fromkeys(STEPS, 0)
        self._rows: dict[str, TaskID] = {}
        if bars:
            good = len(demo_invoices.CUSTOMERS) + 1
            self._rows = {step: bars.add_task(step, total=INVOICES if step == "submitted" else good) for step in STEPS}

    def counts(self, **counts: int) -> None:
        """Show new counts, by step."""
        if counts.items() <= self._counts.items():
            return
        self._counts |= counts
        if counts.get("submitted", INVOICES) % LINE_EACH and not self._bars:
            return
        if self._bars:
            for step, count in counts.items():
                self._bars.update(self._rows[step], completed=count)
        else:
            text = ", ".join(f"{count} {step}" for step, count in self._counts.items())
            self._console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Show]:
    if not console.is_terminal:
        yield Show(console, None)
        return
    columns = (TextColumn("{task.description:>9}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield Show(console, bars)


def _submit(mesh: Taskmesh, show: Show) -> tuple[list[Order], list[Refusal]]:
    """Submit all thirty, the bad ones among the good."""
    run = secrets.token_hex(4)
    orders: list[Order] = []
    refusals: list[Refusal] = []
    mistakes = iter(demo_invoices.bad())
    for number, invoice in enumerate(demo_invoices.good()):
        # A new name for each run: within one, however often a request is repeated, it is the same invoice.
        key = f"demo-{run}-{number}"
        task = mesh.submit(invoice, tags=["demo", f"demo-{run}"], idempotency_key=key)
        orders.append(Order(invoice, task))
        if number % 9 == 4 and (mistake := next(mistakes, None)):
            refusals.append(Refusal(mistake, _refusal(mesh, mistake, f"demo-{run}-bad-{number}")))
        show.counts(submitted=len(orders) + len(refusals))
    return orders, refusals


def _refusal(mesh: Taskmesh, mistake: Mistake, key: str) -> TaskmeshProblem | None:
    try:
        mesh.submit(IssueInvoice.type_name, mistake.payload, tags=["demo"], idempotency_key=key)
    except InvalidRequest as problem:
        return problem
    return None


def _watch(mesh: Taskmesh, pages: httpx.Client, orders: list[Order], show: Show, *, seconds: float) -> None:
    """Follow every invoice into the inbox.

    Raises:
        Unfinished: One of them failed, or was not there in time.
    """
    deadline = time.monotonic() + seconds
    by_root = {order.task.id: order for order in orders}
    while True:
        _read_ledger(mesh, by_root)
        _read_inbox(pages, orders)
        issued, rendered, mailed = (
            sum(getattr(order, step) for order in orders) for step in ("issued", "rendered", "mailed")
        )
        show.counts(issued=issued, rendered=rendered, mailed=mailed)
        if mailed == len(orders) or time.monotonic() > deadline or any(order.failure for order in orders):
            break
        time.sleep(POLL_SECONDS)
    _demand_all(orders, seconds)


def _read_ledger(mesh: Taskmesh, by_root: dict[UUID, Order]) -> None:
    """Note every task that belongs to one of the orders."""
    since = min(order.task.created_at for order in by_root.values()) - timedelta(seconds=1)
    for task in mesh.list(created_after=since, page_size=200):
        order = by_root.get(task.root_id or task.id)
        if order:
            order.tree[task.type] = task


def _read_inbox(pages: httpx.Client, orders: list[Order]) -> None:
    """Note every mail of the orders; a page that is away is asked again later."""
    sent = {order.mail_key: order for order in orders if order.mail_key}
    if all(order.mails for order in sent.values()):
        return
    found = _fetch(pages, "TASKMESH_INBOX_URL", "/api/messages?limit=1000")
    if found is None:
        return
    for order in sent.values():
        order.mails = []
    for mail in found["items"]:
        # Message-ID: <task.invoice@domain>
        owner = sent.get(mail["message_id"].lstrip("<").partition(".")[0])
        if owner:
            owner.mails.append(mail)


def _fetch(pages: httpx.Client, variable: str, path: str) -> dict[str, Any] | None:
    """What a page answers; None when it is away or knows of nothing."""
    try:
        answer = pages.get(os.environ[variable] + path)
        answer.raise_for_status()
    except httpx.HTTPError:
        return None
    content: dict[str, Any] = answer.json()
    return content


def _demand_all(orders: list[Order], seconds: float) -> None:
    for order in orders:
        task = order.failure
        if task:
            reason = f": {task.error.message}" if task.error else ""
            raise Unfinished(f"{task.type} of {order.invoice.buyer.name} {task.state}{reason} (taskmesh get {task.id})")
    late = [order for order in orders if not order.mailed]
    if late:
        raise Unfinished(
            f"{len(late)} of {len(orders)} invoices were not mailed within {seconds:g} s; the first waits for "
            f"{_waits_for(late[0])} (taskmesh list --root {late[0].task.id}). `make status` shows what is down."
        )
    bare = [order for order in orders if not all(_has_document(mail) for mail in order.mails)]
    if bare:
        raise Unfinished(f"the mail of invoice {bare[0].number} is without its document")


def _waits_for(order: Order) -> str:
    if not order.issued:
        return "its number"
    return "its mail" if order.rendered else "its document"


def _has_document(mail: dict[str, Any]) -> bool:
    return any(part["media_type"] == "application/pdf" and part["size_bytes"] for part in mail["attachments"])


def _find_traces(pages: httpx.Client, orders: list[Order]) -> list[dict[str, Any]]:
    """The traces of the orders that have reached the trace page, whole if they come in time."""
    deadline = time.monotonic() + TRACES_SECONDS
    traces: dict[str, dict[str, Any]] = {}
    while True:
        for trace_id in {order.task.trace_id for order in orders if order.task.trace_id}:
            if trace_id in traces and _is_whole(traces[trace_id]):
                continue
            if trace := _fetch(pages, "TASKMESH_TRACES_URL", f"/api/traces/{trace_id}"):
                traces[trace_id] = trace
        whole = sum(_is_whole(trace) for trace in traces.values())
        if whole == len(orders) or time.monotonic() > deadline:
            return list(traces.values())
        time.sleep(POLL_SECONDS)


def _is_whole(trace: dict[str, Any]) -> bool:
    return not trace["orphans"] and "email-worker" in trace["services"]


def _summarize(
    console: Console, orders: list[Order], refusals: list[Refusal], traces: list[dict[str, Any]], took: timedelta
) -> None:
    inbox, pages = os.environ["TASKMESH_INBOX_URL"], os.environ["TASKMESH_TRACES_URL"]
    console.print()
    console.print(_invoices(orders, console.width))
    console.print()
    console.print("Refused, as they must be:", highlight=False)
    for refusal in refusals:
        console.print(_told(refusal), highlight=False, soft_wrap=True)
    mails = sum(len(order.mails) for order in orders)
    whole = sum(_is_whole(trace) for trace in traces)
    console.print(
        f"\n[bold]{len(orders)}[/] invoices and [bold]{mails}[/] mails in {took.total_seconds():.1f} s", highlight=False
    )
    lines = [f"Inbox          {inbox}"]
    if traces:
        slowest = max(traces, key=lambda trace: trace["duration_ms"])
        lines.append(f"Slowest trace  {slowest['duration_ms'] / 1000:.1f} s  {pages}/traces/{slowest['trace_id']}")
    twice = [order.number for order in orders if len(order.mails) > 1]
    if twice:
        # SMTP has no transactions: who is killed before the relay's answer is noted has to send again.
        lines.append(f"Sent again under the same Message-ID, as a mail program can tell: {', '.join(twice)}")
    if whole < len(orders):
        # Not a failure: spans are told once and not stored, so a process that is killed takes its last ones along.
        lines.append(
            f"Only {whole} of {len(orders)} traces are whole: was a process killed, or is the trace page down?"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _invoices(orders: Iterable[Order], width: int) -> Table:
    shown = sorted(orders, key=lambda each: each.number)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    # Where the terminal is narrow, names and addresses are cut; numbers are not. Rich would leave out whole columns.
    number, total = (max(len(getattr(order, name)) for order in shown) for name in ("number", "total"))
    name, address = (max(cell_len(getattr(order.invoice.buyer, name)) for order in shown) for name in ("name", "email"))
    room = width - number - len("LINES") - total - GAPS
    name = min(name, max(room - address, room * 3 // 5))
    table.add_column("INVOICE", no_wrap=True)
    table.add_column("CUSTOMER", no_wrap=True, overflow="ellipsis", max_width=name)
    table.add_column("LINES", justify="right", no_wrap=True)
    table.add_column("TOTAL", justify="right", no_wrap=True)
    table.add_column("MAIL TO", no_wrap=True, overflow="ellipsis", max_width=room - name)
    for order in shown:
        buyer = order.invoice.buyer
        table.add_row(order.number, escape(buyer.name), str(len(order.invoice.lines)), order.total, escape(buyer.email))
    return table


def _told(refusal: Refusal) -> str:
    if refusal.problem is None:
        return f"  [red]✗[/red] {refusal.mistake.what}: accepted"
    sign = "[green]✓[/green]" if refusal.right else "[red]✗[/red]"
    places = "; ".join(f"{error.pointer} {_short(error.detail)}" for error in refusal.problem.errors)
    return f"  {sign} {refusal.mistake.what}:\n    {refusal.problem.status} {refusal.problem.code}, {escape(places)}"


def _short(text: str, length: int = 35) -> str:
    return text if len(text) <= length else f"{text[:length].rsplit(',', 1)[0]} …"


def _complain(text: str) -> None:
    Console(file=sys.stderr).print(f"[red]✗[/red] {escape(text)}", highlight=False, soft_wrap=True)
