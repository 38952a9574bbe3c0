"""The limit: reads and validates what the gateway reads and validates, and answers with it."""

from __future__ import annotations

from fastapi import FastAPI

from gateway.schemas import BatchSubmission, TaskSubmission

app = FastAPI()


@app.post("/v1/tasks", status_code=202)
async def echo(submission: TaskSubmission) -> TaskSubmission:
    return submission


@app.post("/v1/tasks:batchCreate", status_code=202)
async def echo_batch(batch: BatchSubmission) -> BatchSubmission:
    return batch
