"""`taskmesh dead`: messages that could not be run."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypedDict, Unpack
from uuid import UUID

import typer

from taskmesh.cli import inputs, letters, output
from taskmesh.cli.failures import UsageError
from taskmesh.cli.tasks import AsJson, connect
from taskmesh.client.dead_letters import LetterFilter

app = typer.Typer(help="Messages that could not be run: why, and what becomes of them.", no_args_is_help=True)

State = Literal["open", "replayed", "discarded", "all"]
StateOption = Annotated[State, typer.Option(help="What was done about them.")]
Service = Annotated[str | None, typer.Option(help="Only of this service.")]
TypeName = Annotated[str | None, typer.Option("--type", help="Only of this task type.")]
Code = Annotated[str | None, typer.Option(help="Only those with this code, such as contract_violation.")]
Reason = Annotated[str | None, typer.Option(help="Only those that the broker gave up for this reason.")]
TaskOption = Annotated[UUID | None, typer.Option("--task", help="Only of this task.")]
Group = Annotated[str | None, typer.Option(metavar="FINGERPRINT", help="Only of this group; see `dead groups`.")]
Since = Annotated[str | None, typer.Option(help="Only from this moment on, or this long ago: 30m, 2h, 1d.")]
Until = Annotated[str | None, typer.Option(help="Only before this moment, or before this long ago.")]
LetterId = Annotated[int, typer.Argument(metavar="ID", min=1, help="The dead letter's number.")]
OneOrNone = Annotated[int | None, typer.Argument(metavar="[ID]", min=1, help="One dead letter; or choose by options.")]
Most = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many at most, the oldest first.")]
All = Annotated[bool, typer.Option("--all", help="Every open dead letter.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before many are dealt with.")]


@app.command("list")
def list_letters(
    *,
    state: StateOption = "open",
    service: Service = None,
    type_name: TypeName = None,
    code: Code = None,
    reason: Reason = None,
    task: TaskOption = None,
    group: Group = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first."""
    wanted = _filter(
        service=service,
        type=type_name,
        code=code,
        reason=reason,
        task_id=task,
        fingerprint=group,
        since=since,
        until=until,
    )
    with connect() as mesh:
        found = list(mesh.dead_letters.list(state=None if state == "all" else state, limit=limit, **wanted))
    output.print_json(found) if as_json else letters.print_letters(found, with_state=state != "open")


@app.command()
def groups(
    *,
    state: StateOption = "open",
    service: Service = None,
    type_name: TypeName = None,
    code: Code = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Show what dead letters died of, the largest group first."""
    wanted = _filter(service=service, type=type_name, code=code, reason=reason, since=since, until=until)
    with connect() as mesh:
        found = mesh.dead_letters.groups(state=None if state == "all" else state, **wanted)
    output.print_json(found) if as_json else letters.print_groups(found)


@app.command()
def show(letter_id: LetterId, *, as_json: AsJson = False) -> None:
    """Show a dead letter with its body, its headers, and what has happened to its task."""
    with connect() as mesh:
        letter = mesh.dead_letters.get(letter_id)
    output.print_json(letter) if as_json else letters.print_letter(letter)


@app.command()
def replay(
    letter_id: OneOrNone = None,
    *,
    payload: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="Instead of its own: a file, - for standard input, or JSON.")
    ] = None,
    new_type: Annotated[str | None, typer.Option("--as", help="The task type of a letter that cannot be read.")] = None,
    service: Service = None,
    type_name: TypeName = None,
    code: Code = None,
    reason: Reason = None,
    group: Group = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option(help="So many a second; without it, all at once.")] = None,
    limit: Most = 10_000,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send a dead letter, or all that the options choose, again: each as a new task, once."""
    wanted = _filter(
        service=service, type=type_name, code=code, reason=reason, fingerprint=group, since=since, until=until
    )
    _check_choice(letter_id, wanted, everything=everything)
    with connect() as mesh:
        if letter_id is not None and not dry_run:
            replayed = mesh.dead_letters.replay(letter_id, _content(payload), type=new_type)
            output.print_json(replayed) if as_json else letters.print_replayed(replayed)
            return
        if letter_id is not None or payload is not None or new_type is not None:
            raise UsageError("--dry-run, --payload and --as do not go together: one letter is mended at a time")
        plan = mesh.dead_letters.replay_many(rate_per_second=rate, dry_run=True, limit=limit, **wanted)
        if not dry_run and plan.replayed:
            _confirm(f"Replay {letters.count(plan.replayed)}?", lambda: letters.print_bulk_replay(plan), yes=yes)
            plan = mesh.dead_letters.replay_many(rate_per_second=rate, limit=limit, **wanted)
    output.print_json(plan) if as_json else letters.print_bulk_replay(plan)


@app.command()
def discard(
    letter_id: OneOrNone = None,
    *,
    note: Annotated[str | None, typer.Option(help="Why; kept with the letter.")] = None,
    service: Service = None,
    type_name: TypeName = None,
    code: Code = None,
    reason: Reason = None,
    group: Group = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    limit: Most = 10_000,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Put a dead letter, or all that the options choose, away: nothing is run."""
    wanted = _filter(
        service=service, type=type_name, code=code, reason=reason, fingerprint=group, since=since, until=until
    )
    _check_choice(letter_id, wanted, everything=everything)
    with connect() as mesh:
        if letter_id is not None:
            if dry_run:
                raise UsageError("--dry-run is for many")
            letter = mesh.dead_letters.discard(letter_id, note=note)
            output.print_json(letter) if as_json else letters.print_letters([letter], with_state=True)
            return
        outcome = mesh.dead_letters.discard_many(note=note, dry_run=True, limit=limit, **wanted)
        if not dry_run and outcome.discarded:
            _confirm(f"Discard {letters.count(outcome.discarded)}?", lambda: None, yes=yes)
            outcome = mesh.dead_letters.discard_many(note=note, limit=limit, **wanted)
    output.print_json(outcome) if as_json else letters.print_bulk_discard(outcome)


class _Choice(TypedDict, total=False):
    """What a person says of letters, beside their times."""

    service: str | None
    type: str | None
    code: str | None
    reason: str | None
    task_id: UUID | None
    fingerprint: str | None


def _filter(*, since: str | None, until: str | None, **chosen: Unpack[_Choice]) -> LetterFilter:
    times = {name: None if text is None else _past(text) for name, text in (("since", since), ("until", until))}
    return LetterFilter(**chosen, since=times["since"], until=times["until"])


def _past(text: str) -> datetime:
    """A moment, or a length of time before now."""
    is_length = inputs.DURATION.match(text) and "-" not in text
    return datetime.now(UTC) - inputs.duration(text) if is_length else inputs.moment(text)


def _check_choice(letter_id: int | None, wanted: LetterFilter, *, everything: bool) -> None:
    chosen = any(value is not None for value in wanted.values())
    if letter_id is None and not chosen and not everything:
        raise UsageError("say which: an ID, --group FINGERPRINT, another option that chooses, or --all")
    if letter_id is not None and (chosen or everything):
        raise UsageError("give an ID, or options that choose among all; not both")


def _content(payload: str | None) -> dict[str, Any] | None:
    if payload is None:
        return None
    is_file = payload != "-" and not payload.lstrip().startswith(("{", "@"))
    return inputs.payload(f"@{payload}" if is_file else payload, [])


def _confirm(question: str, show_plan: Any, *, yes: bool) -> None:
    """Have a person say yes; a program has to say so beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("many dead letters would be dealt with: say --yes, or --dry-run to see")
    show_plan()
    if not typer.confirm(question, err=True):
        raise typer.Abort
