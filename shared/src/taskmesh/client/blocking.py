"""The client for ordinary code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import UUID

import httpx

from taskmesh.client import (
    actions,
    connection,
    dead_letters,
    operations,
    reconciliation,
    schedules,
    services,
    streaming,
)
from taskmesh.client.dead_letters import (
    BulkDiscard,
    BulkReplay,
    DeadLetter,
    DeadLetterDetail,
    DeadLetterGroup,
    LetterFilter,
    Replayed,
)
from taskmesh.client.drivers import Driver
from taskmesh.client.exchange import Patience
from taskmesh.client.operations import Filter, Seconds, Submission, SubmitOptions
from taskmesh.client.reconciliation import Reconciliation
from taskmesh.client.results import Cancelling, Explanation, Schedule, Service, StateChange, Task, TaskType
from taskmesh.client.schedules import NewSchedule, ScheduleChanges
from taskmesh.contracts import Command


class Taskmesh:
    """Submits tasks to a gateway and follows them; safe to share between threads.

        with Taskmesh.from_env() as mesh:
            task = mesh.submit(IssueInvoice(...), wait=30)

    Every call is tried again after a lost connection and after 429, 502, 503 and 504, for as long as `timeout` allows,
    provided that doing it twice is the same as once. The caller's trace is carried along.

    Args:
        url: The gateway's address, such as `https://taskmesh.internal`.
        api_key: What `python -m gateway keys create` printed.
        timeout: The longest that one call may take with all its retries; waiting that the caller asks for is added.
        http: A client with other TLS or proxy settings; it stays the caller's to close.

    Raises (every method):
        TaskmeshProblem: The gateway refused; the subclass says why.
        GatewayUnreachable: There was no answer.
    """

    def __init__(self, url: str, api_key: str, *, timeout: Seconds = 30.0, http: httpx.Client | None = None) -> None:
        self._owned = http is None
        self._http = http or httpx.Client()
        connection.address(self._http, url, api_key)
        self._driver = Driver(self._http)
        self._patience = Patience(total_seconds=operations.in_seconds(timeout))
        self.schedules = Schedules(self._driver, self._patience)
        self.dead_letters = DeadLetters(self._driver, self._patience)

    @classmethod
    def from_env(cls, *, timeout: Seconds = 30.0) -> Self:
        """The client that `TASKMESH_URL` and `TASKMESH_API_KEY` describe.

        Raises:
            NotConfigured: One of them is missing.
        """
        url, api_key = connection.from_environment()
        return cls(url, api_key, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connections."""
        if self._owned:
            self._http.close()

    def submit(
        self,
        task: str | Command,
        payload: Mapping[str, Any] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Task:
        """Submit a contract, or a type with its payload; the task is on disk when this returns.

        Raises:
            UnknownType: No service has announced the type.
            PayloadRefused: The payload does not fit the contract of its type.
            IdempotencyConflict: The key was used before, with another body.
        """
        return self._driver.run(operations.submit(task, payload, options, self._patience))

    def submit_many(
        self, tasks: Iterable[Submission | Command], *, idempotency_key: str | None = None
    ) -> tuple[Task, ...]:
        """Submit up to 500 tasks, all or none; pointers of a refusal begin with `/tasks/<index>`."""
        return self._driver.run(operations.submit_many(tasks, idempotency_key, self._patience))

    def get(self, task_id: UUID | str) -> Task:
        """The task as it is now."""
        return self._driver.run(operations.get(task_id, self._patience))

    def wait(self, task_id: UUID | str, timeout: Seconds) -> Task:
        """The finished task, whatever its final state.

        Raises:
            WaitTimeout: It is not finished within `timeout`, and goes on.
        """
        return self._driver.run(operations.wait(task_id, timeout, self._patience))

    def wait_tree(self, task_id: UUID | str, timeout: Seconds) -> tuple[Task, ...]:
        """The task and everything that followed from it, root first, once all of it is finished.

        Raises:
            WaitTimeout: Some of it is not finished within `timeout`, and goes on.
        """
        return self._driver.run(operations.wait_tree(task_id, timeout, self._patience))

    def cancel(
        self, task_id: UUID | str, *, reason: str | None = None, force: bool = False, wait: Seconds | None = None
    ) -> Cancelling:
        """Cancel a task wherever it is: what has not begun never does, what runs is told.

        Args:
            reason: Shown with the task.
            force: Kill the process that runs it; refused as `Conflict` where the task's type does not allow that.
            wait: Wait this long for its service to say how it ended.
        """
        return self._driver.run(actions.cancel(task_id, reason=reason, force=force, wait=wait, patience=self._patience))

    def retry(
        self,
        task_id: UUID | str,
        *,
        payload: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Task:
        """Try a task again that failed, was cancelled or expired: as a new task, whose `retry_of` is the old one.

        Args:
            payload: Instead of its own; needed where the gateway does not know that.

        Raises:
            Conflict: It has not ended, has succeeded, or was tried again already.
            PayloadRefused: The payload does not fit the contract of its type, as it is at the moment.
        """
        return self._driver.run(actions.retry(task_id, payload, idempotency_key, self._patience))

    def explain(self, task_id: UUID | str) -> Explanation:
        """Why the task is not done: one reason, the facts, and what to do about it."""
        return self._driver.run(actions.explain(task_id, self._patience))

    def services(self) -> tuple[Service, ...]:
        """Every worker service that has announced itself."""
        return self._driver.run(services.list_services(self._patience))

    def pause_service(self, service: str, *, reason: str | None = None) -> Service:
        """Have the service's workers take no more tasks; what runs is finished, and what comes is kept."""
        return self._driver.run(services.pause(service, reason, self._patience))

    def resume_service(self, service: str) -> Service:
        """Have the service's workers take tasks again."""
        return self._driver.run(services.resume(service, self._patience))

    def list(self, *, limit: int | None = None, page_size: int = 100, **wanted: Unpack[Filter]) -> Iterator[Task]:
        """The tasks that match, newest first, fetched page by page."""
        return self._driver.iterate(operations.list_tasks(wanted, limit, page_size, self._patience))

    def events(self, task_id: UUID | str, *, tree: bool = False, after: int | None = None) -> Iterator[StateChange]:
        """Every change of state of the task, from its first (or behind `after`) to its last, as they happen.

        Args:
            tree: Those of all tasks of the same request, until the last of them is finished.
        """
        return self._driver.iterate(streaming.follow(task_id, tree=tree, after=after, patience=self._patience))

    def types(self) -> tuple[TaskType, ...]:
        """Every task type that services have announced."""
        return self._driver.run(operations.list_types(self._patience))

    def type(self, name: str) -> TaskType:
        """One task type, with its schema.

        Raises:
            UnknownType: No service has announced it.
        """
        return self._driver.run(operations.get_type(name, self._patience))

    def reconciliation(self) -> Reconciliation:
        """The last audit: is every task that was ever accepted accounted for?"""
        return self._driver.run(reconciliation.last(self._patience))

    def reconcile(self, *, grace: Seconds | None = None) -> Reconciliation:
        """Audit now; the answer is an audit that started after the call.

        Args:
            grace: Examine tasks without news for that long, instead of the gateway's own time.

        Raises:
            GatewayUnavailable: No reconciler answers.
        """
        return self._driver.run(reconciliation.run(grace, self._patience))


class Schedules:
    """Makes and changes schedules."""

    def __init__(self, driver: Driver, patience: Patience) -> None:
        self._driver = driver
        self._patience = patience

    def create(
        self,
        name: str,
        task: str | Command,
        payload: Mapping[str, Any] | None = None,
        **options: Unpack[NewSchedule],
    ) -> Schedule:
        """Have a task submitted at every fire of a cron line or an interval.

        Raises:
            Conflict: The name is taken.
        """
        return self._driver.run(schedules.create(name, task, payload, options, self._patience))

    def list(self, *, page_size: int = 100) -> Iterator[Schedule]:
        """Every schedule, fetched page by page."""
        return self._driver.iterate(schedules.list_schedules(page_size, self._patience))

    def get(self, schedule_id: UUID | str) -> Schedule:
        """The schedule as it is now."""
        return self._driver.run(schedules.get(schedule_id, self._patience))

    def update(self, schedule_id: UUID | str, **changes: Unpack[ScheduleChanges]) -> Schedule:
        """Change what is given and leave the rest."""
        return self._driver.run(schedules.update(schedule_id, changes, self._patience))

    def pause(self, schedule_id: UUID | str) -> Schedule:
        """Fire no more until resumed."""
        return self._driver.run(schedules.pause(schedule_id, self._patience))

    def resume(self, schedule_id: UUID | str) -> Schedule:
        """Fire again."""
        return self._driver.run(schedules.resume(schedule_id, self._patience))

    def delete(self, schedule_id: UUID | str) -> None:
        """Fire never again; tasks that it has submitted stay."""
        self._driver.run(schedules.delete(schedule_id, self._patience))


class DeadLetters:
    """Sees to messages that could not be run."""

    def __init__(self, driver: Driver, patience: Patience) -> None:
        self._driver = driver
        self._patience = patience

    def list(
        self,
        *,
        state: str | None = None,
        limit: int | None = None,
        page_size: int = 100,
        **wanted: Unpack[LetterFilter],
    ) -> Iterator[DeadLetter]:
        """The letters that match, newest first, fetched page by page.

        Args:
            state: `open`, `replayed` or `discarded`; None for all.
        """
        return self._driver.iterate(dead_letters.list_letters(wanted, state, limit, page_size, self._patience))

    def groups(self, *, state: str | None = "open", **wanted: Unpack[LetterFilter]) -> tuple[DeadLetterGroup, ...]:
        """The letters that match, by what they died of, the largest group first."""
        return self._driver.run(dead_letters.list_groups(wanted, state, self._patience))

    def get(self, letter_id: int) -> DeadLetterDetail:
        """The letter with its body, its headers and what has happened to its task."""
        return self._driver.run(dead_letters.get(letter_id, self._patience))

    def replay(
        self,
        letter_id: int,
        payload: Mapping[str, Any] | None = None,
        *,
        type: str | None = None,  # noqa: A002 - as in the contract
    ) -> Replayed:
        """Send a letter again as a new task, with another payload if one is given.

        Args:
            type: Of a letter that cannot be read.

        Raises:
            Conflict: It was replayed or discarded before.
            PayloadRefused: The payload does not fit the contract of its type.
        """
        return self._driver.run(dead_letters.replay(letter_id, payload, type, self._patience))

    def discard(self, letter_id: int, *, note: str | None = None) -> DeadLetter:
        """Put a letter away."""
        return self._driver.run(dead_letters.discard(letter_id, note, self._patience))

    def replay_many(
        self,
        *,
        rate_per_second: float | None = None,
        dry_run: bool = False,
        limit: int | None = None,
        **wanted: Unpack[LetterFilter],
    ) -> BulkReplay:
        """Send the open letters that match again, the oldest first and at most 10,000 of them.

        Args:
            rate_per_second: How fast their tasks become due; None for all at once.
            dry_run: Only say what would be done.
        """
        return self._driver.run(
            dead_letters.replay_many(wanted, rate_per_second, limit, self._patience, dry_run=dry_run)
        )

    def discard_many(
        self,
        *,
        note: str | None = None,
        dry_run: bool = False,
        limit: int | None = None,
        **wanted: Unpack[LetterFilter],
    ) -> BulkDiscard:
        """Put the open letters that match away, the oldest first and at most 10,000 of them."""
        return self._driver.run(dead_letters.discard_many(wanted, note, limit, self._patience, dry_run=dry_run))
