"""How dead letters are shown to people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.json import JSON
from rich.table import Table
from rich.text import Text

from taskmesh.cli import output
from taskmesh.client import BulkDiscard, BulkReplay, DeadLetter, DeadLetterDetail, DeadLetterGroup, Replayed

STATE_STYLES = {"open": "bold red", "replayed": "green", "discarded": "dim"}
CODE_STYLE = "red"
ERROR_WIDTH = 24

HIDDEN_HEADERS = frozenset({"argsrepr", "ignore_result", "kwargsrepr", "lang", "origin", "x-death"})
"""Of no help to a person; `--json` has them."""


def print_letters(letters: Sequence[DeadLetter], *, with_state: bool) -> None:
    """Letters as a table."""
    if not letters:
        output.show(Text("no dead letters", style="green"))
        return
    now = datetime.now(UTC)
    shown = _table("ID", *(("STATE",) if with_state else ()), "DIED", "TYPE", "CODE", "GROUP", "ERROR")
    for one in letters:
        state = (Text(one.state, style=STATE_STYLES[one.state]),) if with_state else ()
        died = output.ago(one.died_at or one.received_at, now)
        code = Text(one.code or one.reason, style=CODE_STYLE)
        # In one line each; `dead show` has the whole error.
        error = Text(one.error or "", no_wrap=True, overflow="ellipsis")
        shown.add_row(str(one.id), *state, died, one.type or f"? in {one.queue}", code, one.error_fingerprint, error)
    output.show(shown)
    if not with_state:
        _hint(f"taskmesh dead show {letters[0].id}")


def print_groups(groups: Sequence[DeadLetterGroup]) -> None:
    """Groups as a table, the largest first."""
    if not groups:
        output.show(Text("no dead letters", style="green"))
        return
    now = datetime.now(UTC)
    shown = _table("GROUP", "COUNT", "NEWEST", "OLDEST", "TYPE", "CODE", "ERROR")
    for one in groups:
        code = Text(one.code or one.reason, style=CODE_STYLE)
        last, first = output.ago(one.last_at, now), output.ago(one.first_at, now)
        where = one.type or f"? in {one.service}"
        shown.add_row(one.fingerprint, str(one.count), last, first, where, code, one.error)
    output.show(shown)
    largest = groups[0]
    _hint(
        f"taskmesh dead show {largest.sample_id}",
        f"taskmesh dead replay --group {largest.fingerprint} --rate 10 --dry-run",
    )


def print_letter(letter: DeadLetterDetail) -> None:
    """Everything about one letter."""
    now = datetime.now(UTC)
    exception = f" ({letter.exception})" if letter.exception else ""
    state = Text(letter.state, style=STATE_STYLES[letter.state])
    if letter.resolved_at:
        state += Text(f"  {output.ago(letter.resolved_at, now)}", style="dim")
    headers = {name: value for name, value in letter.headers.items() if name not in HIDDEN_HEADERS and _says(value)}
    output.print_fields(
        [
            ("dead letter", Text(str(letter.id), style="bold")),
            ("state", state),
            ("replayed as", letter.replay_task_id),
            ("note", letter.resolution_note),
            ("type", letter.type),
            ("task", letter.task_id),
            ("died in", letter.queue),
            ("died", output.moment_text(letter.died_at or letter.received_at, now)),
            ("reason", letter.reason),
            ("error", Text(f"{letter.code}: {letter.error}{exception}", style=CODE_STYLE)),
            ("attempt", letter.attempt),
            ("group", letter.error_fingerprint),
            ("trace", letter.trace_id),
            ("history", _history(letter)),
            ("headers", JSON.from_data(headers) if headers else None),
            ("body", _body(letter)),
        ]
    )
    if letter.state == "open":
        _hint(f"taskmesh dead replay {letter.id} [--payload FILE]", f"taskmesh dead discard {letter.id} --note WHY")


def print_replayed(replayed: Replayed) -> None:
    """What one letter has become."""
    if replayed.task is None:
        output.show(Text(f"dead letter {replayed.letter.id} is published again"))
        return
    output.print_fields(
        [
            ("dead letter", Text(str(replayed.letter.id), style="bold")),
            ("replayed as", Text(str(replayed.task.id), style="bold")),
            ("type", replayed.task.type),
            ("state", output.state_text(replayed.task.state)),
        ]
    )
    _hint(f"taskmesh wait {replayed.task.id}")


def print_bulk_replay(plan: BulkReplay) -> None:
    """What was done to many letters, or would be."""
    now = datetime.now(UTC)
    verb = "would be replayed" if plan.dry_run else "replayed"
    refused = "cannot be" if plan.dry_run else "could not be, and stay open"
    rows: list[tuple[str, Any]] = [
        (verb, Text(f"{plan.replayed} of {plan.matched}", style="bold")),
        ("first", output.moment_text(plan.first_due_at, now)),
        ("last", output.moment_text(plan.last_due_at, now)),
        (refused, plan.refused or None),
    ]
    rows += [
        (
            "",
            Text(f"{reason.count} {reason.code}", style=CODE_STYLE)
            + Text(f": {reason.detail}, such as {reason.sample_id}"),
        )
        for reason in plan.reasons
    ]
    output.print_fields(rows)


def print_bulk_discard(outcome: BulkDiscard) -> None:
    """What was done to many letters, or would be."""
    verb = "would be discarded" if outcome.dry_run else "discarded"
    output.print_fields([(verb, Text(f"{outcome.discarded} of {outcome.matched}", style="bold"))])


def count(number: int) -> str:
    """So many dead letters, in words."""
    return f"{number} dead letter{'' if number == 1 else 's'}"


def _says(value: Any) -> bool:
    return value not in (None, [], {}, [None, None])


def _table(*columns: str) -> Table:
    """A table whose last column, the error, gives way to all others."""
    made = output.table(*columns)
    made.columns[-1].no_wrap = False
    made.columns[-1].min_width = ERROR_WIDTH
    return made


def _history(letter: DeadLetterDetail) -> Text | None:
    lines = []
    for step in letter.history:
        line = Text(f"{step.at.astimezone():%Y-%m-%d %H:%M:%S}  ", style="dim")
        line += Text(f"{step.state.value:<9}", style=output.STATE_STYLES[step.state])
        line += Text(f"  attempt {step.attempt}" if step.attempt else "")
        failure = (step.detail or {}).get("failure") or {}
        line += Text(f"  {failure.get('code')}" if failure else "", style=CODE_STYLE)
        lines.append(line)
    return Text("\n").join(lines) if lines else None


def _body(letter: DeadLetterDetail) -> Text | JSON:
    """The payload alone of a task's message; else the body as it is."""
    text = letter.body.text
    if text is None:
        return Text(f"{letter.size} bytes that are no text; --json has them in base64", style="dim")
    try:
        content = json.loads(text)
    except ValueError:
        cut = " (cut)" if letter.body.truncated else ""
        return Text(text + cut)
    if isinstance(content, list) and len(content) == 3 and not content[0]:
        content = content[1]
    return JSON.from_data(content)


def _hint(*commands: str) -> None:
    """Say what a person may do next; a program is told nothing that it did not ask for."""
    if sys.stdout.isatty():
        output.show(Text("\n".join(["", *commands]), style="dim"))
