"""The way without a broker: Procrastinate writes the task into PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel

from gateway.schemas import BatchSubmission, TaskSubmission
from meshbench.rivals.procrastinate_tasks import app as procrastinate
from meshbench.rivals.procrastinate_tasks import one_row


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with procrastinate.open_async():
        yield


app = FastAPI(lifespan=lifespan)


class Deferred(BaseModel):
    ids: list[int]


@app.post("/v1/tasks", status_code=202)
async def submit(submission: TaskSubmission) -> Deferred:
    return Deferred(ids=[await one_row.defer_async(**submission.payload)])


@app.post("/v1/tasks:batchCreate", status_code=202)
async def submit_batch(batch: BatchSubmission) -> Deferred:
    return Deferred(ids=await one_row.batch_defer_async(*(each.payload for each in batch.tasks)))
