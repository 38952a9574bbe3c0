"""What a campaign submits, and when: the same seed gives the same orders at the same moments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from taskmesh.client import Submission
from taskmesh.contracts import Command
from taskmesh.contracts.email import Recipient, SendMessage
from taskmesh_local import demo_invoices
from taskmesh_local.faults.trials.contracts import Follow, Poison, Record, Refuse, Steps, Stumble

POISON_EVERY_SECONDS = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One request to the gateway.

    Attributes:
        at: Seconds after the beginning of the load.
        key: Its idempotency key.
        tasks: One task, or a batch.
        expires: Seconds after which it need not run any more.
        repeat_after: Seconds after its answer at which the same request is sent once more.
        cancel_after: Seconds after its answer at which the task is cancelled.
    """

    at: float
    key: str
    tasks: tuple[Submission, ...]
    expires: float | None = None
    repeat_after: float | None = None
    cancel_after: float | None = None


def orders(seed: int, *, seconds: float, rate: float, examples: Sequence[Submission] = ()) -> Iterator[Order]:
    """The orders of a campaign, one every 1/rate seconds; with examples, every fifth is one of these."""
    dice = random.Random(f"load {seed}")  # noqa: S311 - the same load for the same seed is the point
    makers, weights = zip(*MIX.items(), strict=True)
    poison_every = int(POISON_EVERY_SECONDS * rate)
    for number in range(int(seconds * rate)):
        make = dice.choices(makers, weights)[0]
        order = make(dice, number)
        if number % poison_every == poison_every // 2:
            order = _single(Poison())
        elif examples and number % 5 == 0:
            order = _single(dice.choice(examples))
        repeat = dice.uniform(0.0, 10.0) if dice.random() < 0.05 else None
        name = str(UUID(int=dice.getrandbits(128), version=4))
        yield replace(order, at=number / rate, key=f"{seed}-{number}-{name}", repeat_after=repeat)


def _single(task: Submission | Command) -> Order:
    submission = task if isinstance(task, Submission) else Submission.of(task)
    return Order(at=0.0, key="", tasks=(submission,))


def _record(dice: random.Random, _: int) -> Order:
    slow = dice.random() < 0.03
    return _single(Record(work_ms=dice.randint(200, 800) if slow else dice.randint(0, 10)))


def _delayed(dice: random.Random, _: int) -> Order:
    return _single(Submission.of(Record(), delay=timedelta(seconds=dice.uniform(0.5, 20.0))))


def _expiring(dice: random.Random, _: int) -> Order:
    return replace(_single(Record(work_ms=5)), expires=dice.uniform(0.5, 8.0))


def _cancelled(dice: random.Random, _: int) -> Order:
    """Some are cancelled while they are scheduled, others while they are queued, run, or are done."""
    if dice.random() < 0.5:
        order = _single(Submission.of(Record(), delay=timedelta(seconds=dice.uniform(5.0, 15.0))))
        return replace(order, cancel_after=dice.uniform(0.0, 15.0))
    return replace(_single(Record(work_ms=dice.randint(0, 500))), cancel_after=dice.uniform(0.0, 1.0))


def _follow(dice: random.Random, _: int) -> Order:
    return _single(Follow(commands=dice.randint(1, 3), emit=dice.random() < 0.4))


def _steps(dice: random.Random, _: int) -> Order:
    return _single(Steps(work_ms=dice.randint(0, 50)))


def _stumble(dice: random.Random, _: int) -> Order:
    way = dice.choices(("error", "crash", "hang", "stuck"), (60, 32, 4, 4))[0]
    return _single(Stumble(way=way, runs=dice.randint(1, 2) if way in {"error", "crash"} else 1))


def _refuse(_: random.Random, __: int) -> Order:
    return _single(Refuse())


def _batch(dice: random.Random, _: int) -> Order:
    size = dice.randint(3, 8)
    return Order(at=0.0, key="", tasks=tuple(Submission.of(Record()) for _ in range(size)))


def _invoice(dice: random.Random, number: int) -> Order:
    model = dice.choice(INVOICES)
    buyer = model.buyer.model_copy(update={"email": f"buyer-{number}@campaign.example"})
    return _single(model.model_copy(update={"buyer": buyer, "lines": model.lines[:2]}))


def _mail(_: random.Random, number: int) -> Order:
    to = Recipient(address=f"reader-{number}@campaign.example")
    return _single(SendMessage(to=to, subject=f"Notice {number}", text="All is well."))


INVOICES = tuple(invoice for invoice in demo_invoices.good() if len(invoice.lines) <= len(demo_invoices.PRODUCTS))

MIX: Mapping[Callable[[random.Random, int], Order], float] = {
    _record: 42,
    _follow: 16,
    _delayed: 9,
    _steps: 8,
    _stumble: 4,
    _refuse: 3,
    _batch: 6,
    _cancelled: 4,
    _expiring: 2,
    _invoice: 3,
    _mail: 3,
}
"""How often each kind of order comes, in parts of a hundred."""
