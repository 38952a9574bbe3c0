"""The obvious way: a route that is no coroutine calls Celery's `send_task`, and the broker confirms."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

from gateway.schemas import BatchSubmission, TaskSubmission
from meshbench.rivals.celery_tasks import app as celery
from meshbench.rivals.celery_tasks import one_row

app = FastAPI()


class Sent(BaseModel):
    ids: list[str]


@app.post("/v1/tasks", status_code=202)
def submit(submission: TaskSubmission) -> Sent:
    return Sent(ids=[celery.send_task(one_row.name, kwargs=submission.payload).id])


@app.post("/v1/tasks:batchCreate", status_code=202)
def submit_batch(batch: BatchSubmission) -> Sent:
    with celery.producer_pool.acquire(block=True) as producer:
        sent = [celery.send_task(one_row.name, kwargs=each.payload, producer=producer).id for each in batch.tasks]
    return Sent(ids=sent)
