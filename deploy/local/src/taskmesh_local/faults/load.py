"""Submitting tasks at a fixed rate through everything that happens, and keeping book of every answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Self
from uuid import UUID

import httpx

from taskmesh.client import AsyncTaskmesh, ClientError, Submission
from taskmesh.client.results import Task
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.testing.payloads import PayloadFactory
from taskmesh_local.faults.journal import Journal
from taskmesh_local.faults.orders import Order
from taskmesh_local.faults.trials.contracts import Record

PATIENCE_SECONDS = 900.0
"""A caller goes on under the same key for longer than any fault lasts."""
AT_ONCE = 60
SCHEDULE_SECONDS = 2.0


@dataclass(slots=True)
class Books:
    """What the gateway has answered.

    Attributes:
        accepted: Every task of a 202, with the order that it belongs to.
        cancelled: What the gateway said to each request to cancel.
        contradicted: Keys whose repetition named another task.
        refused: Keys of orders that the gateway refused for good, with its answer.
    """

    accepted: dict[UUID, Order] = field(default_factory=dict)
    cancelled: dict[UUID, str] = field(default_factory=dict)
    contradicted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    requests: int = 0
    repeated: int = 0
    schedules: list[UUID] = field(default_factory=list)

    def types(self) -> Counter[str]:
        """How many tasks of each type were accepted."""
        return Counter(task.type for order in self._orders() for task in order.tasks)

    def _orders(self) -> list[Order]:
        return list({order.key: order for order in self.accepted.values()}.values())


class Load:
    """Submits orders to a gateway; use it as an async context manager."""

    def __init__(self, url: str, api_key: str, journal: Journal) -> None:
        # Quick to give a try up, because the same key makes the next one safe.
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
        self._http = httpx.AsyncClient(limits=limits, trust_env=False)
        self._client = AsyncTaskmesh(url, api_key, timeout=PATIENCE_SECONDS, http=self._http)
        self._journal = journal
        self._turns = asyncio.Semaphore(AT_ONCE)
        self.books = Books()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self, orders: Iterable[Order]) -> None:
        """Submit each order at its time; returns when every one of them is answered."""
        schedule = await self._client.schedules.create(
            "campaign", Record(), interval_seconds=SCHEDULE_SECONDS, misfire="all"
        )
        self.books.schedules.append(schedule.id)
        async with asyncio.TaskGroup() as group:
            for order in orders:
                await asyncio.sleep(max(0.0, order.at - self._journal.seconds))
                group.create_task(self._place(order))
        await self._client.schedules.pause(schedule.id)

    async def examples(self, services: Collection[str]) -> tuple[Submission, ...]:
        """A payload that fits, for each type of these services that may be submitted."""
        found = []
        for listed in await self._client.types():
            if listed.service in services and listed.kind is TaskKind.COMMAND:
                announced = await self._client.type(listed.type)
                found.append(Submission(type=listed.type, payload=PayloadFactory()(announced.payload_schema or {})))
        return tuple(found)

    async def explain(self, task_ids: Iterable[UUID]) -> None:
        """Note why these tasks are not done."""
        for task_id in task_ids:
            try:
                explanation = await self._client.explain(task_id)
            except ClientError as error:
                self._journal.note(f"{task_id} is not explained: {error}")
            else:
                self._journal.note(f"{task_id} {explanation.state}, {explanation.reason}: {explanation.summary}")

    async def _place(self, order: Order) -> None:
        if order.expires is not None:
            expires_at = datetime.now(UTC) + timedelta(seconds=order.expires)
            order = replace(order, tasks=tuple(replace(task, expires_at=expires_at) for task in order.tasks))
        ids = await self._submit(order)
        if ids is None:
            return
        self.books.accepted |= dict.fromkeys(ids, order)
        if order.cancel_after is not None:
            await asyncio.sleep(order.cancel_after)
            await self._cancel(ids[0])
        if order.repeat_after is not None:
            await asyncio.sleep(order.repeat_after)
            self.books.repeated += 1
            if await self._submit(order) != ids:
                self.books.contradicted.append(order.key)

    async def _submit(self, order: Order) -> tuple[UUID, ...] | None:
        """The ids of the order's tasks, once the gateway has answered; None if it refuses."""
        async with self._turns:
            self.books.requests += 1
            try:
                return tuple(task.id for task in await self._send(order))
            except ClientError as error:
                self.books.refused[order.key] = str(error)
                self._journal.note(f"order {order.key} refused: {error}")
                return None

    async def _cancel(self, task_id: UUID) -> None:
        async with self._turns:
            try:
                self.books.cancelled[task_id] = (await self._client.cancel(task_id)).outcome
            except ClientError as error:
                self.books.refused[f"cancel {task_id}"] = str(error)

    async def _send(self, order: Order) -> tuple[Task, ...]:
        if len(order.tasks) > 1:
            return await self._client.submit_many(order.tasks, idempotency_key=order.key)
        task: Submission = order.tasks[0]
        answer = await self._client.submit(
            task.type, task.payload, delay=task.delay, expires_at=task.expires_at, idempotency_key=order.key
        )
        return (answer,)
