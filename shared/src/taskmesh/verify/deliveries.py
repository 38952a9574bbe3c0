"""Delivering a task in the ways in which a second delivery happens, each in a world that knows nothing of the others.

Nothing is relayed but the task's own retries: what it sends stays in the outbox, where it is counted, and no follow-up
mixes its effects with those of the task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any
from uuid import uuid4

import pika
import psycopg

from taskmesh import celery_protocol, exchanges, lifecycle
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.lifecycle import TaskKind, TaskState
from taskmesh.contracts.manifest import TypeManifest
from taskmesh.outbox import OutboxMessage
from taskmesh.testing.payloads import PayloadFactory
from taskmesh.verify.effects import (
    Columns,
    Effects,
    advance_sequences,
    count_differences,
    differences,
    growth,
    mail_effects,
    message_effects,
    object_effects,
    probe_effects,
    table_effects,
    varying_columns,
)
from taskmesh.verify.journal import HEADER, Fault, Step
from taskmesh.verify.plan import Plan, PlanMistake
from taskmesh.verify.report import Finding, Report, TypeReport, Verdict, Way, not_exercised
from taskmesh.verify.sandbox import Sandbox, Scene, World

POLL_SECONDS = 0.05
APART_SECONDS = 1.1
"""Between two clean runs: what tells the time in whole seconds, as a mail's `Date` does, is to differ between them."""

POISON = "poison"
"""The code of a task that has lost as many runs as it has attempts."""


class NotSettled(Exception):
    """A delivery has led to no outcome in time; the text says what was seen last."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A payload to try a type with, where it came from, and a world in which it makes sense."""

    payload: Mapping[str, Any]
    source: str
    world: World


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended.

    Attributes:
        state: None if its message was parked without a word.
        code: Why it failed, or is to be retried.
    """

    state: TaskState | None
    code: str | None = None
    message: str = ""

    def __str__(self) -> str:
        if self.state is None:
            return "dead-lettered"
        return f"{self.state} with {self.code}: {self.message}" if self.code else str(self.state)


class Task:
    """One task of a type, and its message on the wire; the same id in every world."""

    def __init__(self, kind: TypeManifest, payload: Mapping[str, Any], service: str) -> None:
        self.kind = kind.kind
        self._message_id = uuid4()
        self._type = kind
        self._payload = payload
        listens = kind.kind is TaskKind.EVENT
        self.id = celery_protocol.listener_task_id(self._message_id, service) if listens else self._message_id

    def message(self, fault: Fault | None) -> OutboxMessage:
        """The message, with the fault that it is to meet."""
        message = TaskMessage(
            type=self._type.type,
            id=self._message_id,
            payload=self._payload,
            kind=self.kind,
            version=self._type.version,
            headers={HEADER: fault.value} if fault else {},
        )
        return celery_protocol.event(message) if self.kind is TaskKind.EVENT else celery_protocol.command(message)


class Delivering:
    """The deliveries of one task in one scene."""

    def __init__(self, sandbox: Sandbox, scene: Scene, task: Task, connection: psycopg.Connection) -> None:
        self._sandbox = sandbox
        self._scene = scene
        self._task = task
        self._connection = connection
        self._sent = 0

    def deliver(self, fault: Fault | None = None, *, copies: int = 1) -> Outcome:
        """Send the message so many times at once, and wait until every copy, and every retry, is settled.

        Raises:
            NotSettled: They are not, in time.
            SandboxFailed: The worker has ended.
        """
        self._publish([self._task.message(fault)] * copies)
        end = time.monotonic() + self._sandbox.plan.timeout_seconds
        while not self._settled(copies):
            self._scene.check()
            if time.monotonic() > end:
                seconds = self._sandbox.plan.timeout_seconds
                raise NotSettled(f"no outcome within {seconds:.0f} s; last seen: {self._outcome(terminal=False)}")
            time.sleep(POLL_SECONDS)
        return self._outcome(terminal=True)

    def _settled(self, copies: int) -> bool:
        # In this order: what a delivery has committed is visible once its acknowledgement is.
        steps = self.steps()
        retries = self._due_retries()
        if retries:
            self._publish(retries * copies)
            return False
        return steps[Step.ACKNOWLEDGED] + steps[Step.PARKED] >= self._sent and not self._is_waiting()

    def steps(self) -> Mapping[str, int]:
        """How often each step was taken."""
        return self._scene.journal.count(str(self._task.id))

    def _publish(self, messages: list[OutboxMessage]) -> None:
        with self._sandbox.channel() as channel:
            channel.confirm_delivery()
            for message in messages:
                properties = pika.BasicProperties(headers=message.headers, **message.properties)
                channel.basic_publish(message.exchange, message.routing_key, message.body, properties, mandatory=True)
        self._sent += len(messages)

    def _due_retries(self) -> list[OutboxMessage]:
        """Take the task's own due messages out of the outbox, as the relay would."""
        rows = self._connection.execute(
            "DELETE FROM outbox WHERE task_id = %s AND due_at <= now()"
            " RETURNING exchange, routing_key, headers, properties, body",
            [self._task.id],
        ).fetchall()
        return [
            OutboxMessage(exchange=exchange, routing_key=key, headers=headers, properties=properties, body=bytes(body))
            for exchange, key, headers, properties, body in rows
        ]

    def _is_waiting(self) -> bool:
        return (
            self._connection.execute("SELECT 1 FROM outbox WHERE task_id = %s", [self._task.id]).fetchone() is not None
        )

    def _outcome(self, *, terminal: bool) -> Outcome:
        """What the ledger would have been told last."""
        rows = self._connection.execute(
            "SELECT body FROM outbox WHERE exchange = %s ORDER BY id", [exchanges.LIFECYCLE]
        ).fetchall()
        events = chain.from_iterable(lifecycle.decode(bytes(body)) for (body,) in rows)
        told = [event for event in events if event.task_id == self._task.id and event.state.terminal >= terminal]
        if not told:
            return Outcome(None)
        failure = told[-1].failure
        return Outcome(told[-1].state, failure.code if failure else None, failure.message if failure else "")

    def effects(self) -> Effects:
        """Everything that the scene's task has done so far."""
        scene = self._scene
        mails = self._sandbox.sink.messages[scene.first_mail :]
        return dict(
            chain(
                table_effects(self._connection),
                message_effects(self._connection, self._task.id),
                mail_effects(mails),
                object_effects(scene.world.objects),
                probe_effects(self._sandbox.plan.probes, scene.environment),
            )
        )


@dataclass(frozen=True, slots=True)
class Alone:
    """What one delivery has done: in counts, and everything that there is afterwards."""

    growth: tuple[str, ...]
    effects: Effects


@dataclass(frozen=True, slots=True)
class Clean:
    """What one delivery does, by two runs of it."""

    alone: Alone
    varying: Columns
    again: Finding


class Verification:
    """Goes through the types of the service that a sandbox holds."""

    def __init__(self, sandbox: Sandbox, say: Callable[[str], None]) -> None:
        self._sandbox = sandbox
        self._plan = sandbox.plan
        self._say = say
        self._sent: dict[str, Sample] = {}
        """A payload of each type that another type has sent, with the world that it was sent from."""

    def report(self) -> Report:
        """Verify every type that the plan asks for.

        Raises:
            PlanMistake: The plan names a type that the service does not have.
        """
        manifest = self._sandbox.manifest
        known = {each.type: each for each in manifest.types}
        if unknown := sorted({*self._plan.only, *self._plan.skip, *self._plan.payloads} - {*known}):
            raise PlanMistake(f"{self._plan.service} has no type {', '.join(unknown)}; it has {', '.join(known)}")
        wanted = [name for name in known if name in (self._plan.only or known) and name not in self._plan.skip]
        reports = {name: self._first_try(known[name]) for name in wanted}
        # Once more for those whose made-up payload failed, as soon as another type has sent them a real one.
        waiting = [name for name in wanted if name not in self._plan.payloads]
        while again := [name for name in waiting if _is_untold(reports[name]) and name in self._sent]:
            for name in again:
                waiting.remove(name)
                reports[name] = self._examined(known[name], self._sent[name])
        skipped = tuple(name for name in known if name not in wanted)
        return Report(
            service=manifest.service, release=manifest.release, types=tuple(reports.values()), skipped=skipped
        )

    def _first_try(self, kind: TypeManifest) -> TypeReport:
        first = self._sandbox.first
        if given := self._plan.payloads.get(kind.type):
            return self._examined(kind, Sample(given, "given", first))
        try:
            made = PayloadFactory().from_schema(kind.payload_schema)
        except ValueError as error:
            reason = f"no payload can be made from its schema: {error}; give one"
            return TypeReport(type=kind.type, kind=kind.kind, payload="none", findings=not_exercised(reason))
        return self._examined(kind, Sample(made, "schema", first))

    def _examined(self, kind: TypeManifest, sample: Sample) -> TypeReport:
        task = Task(kind, sample.payload, self._plan.service)
        clean = self._clean(kind, task, sample)
        if isinstance(clean, str):
            return TypeReport(type=kind.type, kind=kind.kind, payload=sample.source, findings=not_exercised(clean))
        return TypeReport(
            type=kind.type,
            kind=kind.kind,
            payload=sample.source,
            effects=clean.alone.growth,
            not_compared=tuple(
                f"{name}.{column}" for name, columns in sorted(clean.varying.items()) for column in sorted(columns)
            ),
            findings=(
                clean.again,
                self._faulty(kind, task, sample, clean, Way.KILLED),
                self._faulty(kind, task, sample, clean, Way.AT_ONCE),
            ),
        )

    def _clean(self, kind: TypeManifest, task: Task, sample: Sample) -> Clean | str:
        """Deliver the task in two worlds, and once more in the second; or say why that tells nothing."""
        alone, begun = self._alone(kind, task, sample), time.monotonic()
        if isinstance(alone, str):
            return alone
        self._say(f"{kind.type}: again")
        with self._sandbox.scene(sample.world) as scene, psycopg.connect(scene.database_url, autocommit=True) as rows:
            delivering = Delivering(self._sandbox, scene, task, rows)
            advance_sequences(rows)
            time.sleep(max(0.0, begun + APART_SECONDS - time.monotonic()))
            try:
                outcome = delivering.deliver()
                once = delivering.effects()
            except NotSettled as late:
                return str(late)
            unlike = count_differences(alone.effects, once, ignore=self._plan.ignore)
            if outcome.state is not TaskState.SUCCEEDED or unlike:
                return f"a second clean run was unlike the first: {'; '.join(unlike) or outcome}"
            return Clean(alone, varying_columns(alone.effects, once), self._again(delivering, once))

    def _alone(self, kind: TypeManifest, task: Task, sample: Sample) -> Alone | str:
        """Deliver the task once; what it has sent serves as a sample for other types."""
        self._say(f"{kind.type}: alone")
        with self._sandbox.scene(sample.world) as scene, psycopg.connect(scene.database_url, autocommit=True) as rows:
            delivering = Delivering(self._sandbox, scene, task, rows)
            before = delivering.effects()
            try:
                outcome = delivering.deliver()
            except NotSettled as late:
                return str(late)
            if outcome.state is not TaskState.SUCCEEDED:
                return str(outcome)
            effects = delivering.effects()
            names = [name.removeprefix("message ") for name in effects if name.startswith("message ")]
            for name in names:
                payload = effects[f"message {name}"][0]
                self._sent.setdefault(name, Sample(payload, f"sent by {kind.type}", scene.world))
            scene.is_kept = bool(names)
            return Alone(tuple(growth(before, effects)), effects)

    def _again(self, delivering: Delivering, once: Effects) -> Finding:
        """The same message after the commit: in the same world nothing at all may change."""
        try:
            delivering.deliver()
        except NotSettled as late:
            return Finding(way=Way.AGAIN, verdict=Verdict.NOT_EXERCISED, details=(str(late),))
        return self._judged(Way.AGAIN, once, delivering.effects(), varying={})

    def _faulty(self, kind: TypeManifest, task: Task, sample: Sample, clean: Clean, way: Way) -> Finding:
        self._say(f"{kind.type}: {way.value.replace('_', ' ')}")
        fault, copies, step = (Fault.KILL, 1, Step.KILLED) if way is Way.KILLED else (Fault.MEET, 2, Step.MET)
        with self._sandbox.scene(sample.world) as scene, psycopg.connect(scene.database_url, autocommit=True) as rows:
            delivering = Delivering(self._sandbox, scene, task, rows)
            try:
                outcome = delivering.deliver(fault, copies=copies)
            except NotSettled as late:
                return Finding(way=way, verdict=Verdict.NOT_EXERCISED, details=(str(late),))
            if reason := _unmet(delivering.steps(), step, outcome, kind):
                return Finding(way=way, verdict=Verdict.NOT_EXERCISED, details=(reason,))
            if outcome.state is not TaskState.SUCCEEDED:
                return Finding(way=way, verdict=Verdict.DIFFERS, details=(f"{outcome}, instead of succeeded",))
            return self._judged(way, clean.alone.effects, delivering.effects(), varying=clean.varying)

    def _judged(self, way: Way, expected: Effects, found: Effects, *, varying: Columns) -> Finding:
        details = differences(expected, found, varying=varying, ignore=self._plan.ignore)
        return Finding(way=way, verdict=Verdict.DIFFERS if details else Verdict.OK, details=tuple(details))


def verify(plan: Plan, say: Callable[[str], None]) -> Report:
    """Verify a service in a sandbox that is gone afterwards.

    Args:
        say: Is told what is going on, for whoever waits.

    Raises:
        PlanMistake: The plan names what the service does not have.
        PartMissing, PartDidNotStart, SandboxFailed: There is no sandbox, or the service did not come up in it.
    """
    with Sandbox(plan, say) as sandbox:
        return Verification(sandbox, say).report()


def _is_untold(report: TypeReport) -> bool:
    """True if nothing could be found out about the type."""
    return all(finding.verdict is Verdict.NOT_EXERCISED for finding in report.findings)


def _unmet(steps: Mapping[str, int], step: Step, outcome: Outcome, kind: TypeManifest) -> str | None:
    """Why a run says nothing about the fault that it was to meet; None if it does."""
    if not steps[step] and step is Step.KILLED:
        return "the fault did not happen: no run came to its last commit"
    if not steps[step]:
        return "the fault did not happen: no two copies ran at once"
    if outcome.code == POISON:
        return f"a lost run is not repeated: the type has {kind.max_attempts} attempt(s)"
    return None
