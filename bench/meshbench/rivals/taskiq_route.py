"""The asynchronous way: TaskIQ publishes over aio-pika, which waits for the broker's confirm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from taskiq_aio_pika import AioPikaBroker, Queue

from gateway.schemas import BatchSubmission, TaskSubmission
from meshbench.rivals import AMQP_URL

broker = AioPikaBroker(AMQP_URL).with_queue(Queue(name="rival"))


@broker.task(task_name="nothing")
async def nothing(name: str = "", sent_at: float | None = None) -> None:
    """Leaves nothing."""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()


app = FastAPI(lifespan=lifespan)


class Sent(BaseModel):
    ids: list[str]


@app.post("/v1/tasks", status_code=202)
async def submit(submission: TaskSubmission) -> Sent:
    return Sent(ids=[(await nothing.kiq(**submission.payload)).task_id])


@app.post("/v1/tasks:batchCreate", status_code=202)
async def submit_batch(batch: BatchSubmission) -> Sent:
    sent = await asyncio.gather(*(nothing.kiq(**each.payload) for each in batch.tasks))
    return Sent(ids=[each.task_id for each in sent])
