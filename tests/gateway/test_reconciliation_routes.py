"""The audit over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gateway import audits
from gateway.audits import Balance
from gateway.scopes import Scope

DETAIL = {
    "grace_seconds": 0.0,
    "examined": 3,
    "complete": True,
    "suspected": 1,
    "mended": 0,
    "unknown": {"service_silent": 2},
    "gaps": [{"queue": "greeter", "presumed": 3, "messages": 1, "missing": 2}],
    "cursor": None,
}


async def test_before_the_first_audit_there_is_none(api):
    answer = await api.http.get("/v1/reconciliation")
    assert answer.json() == {"audit": None, "unaccounted": []}


async def test_the_last_audit_is_shown(api):
    found = Balance(accepted=6, waiting=1, running=1, finished=1, dead=1, unaccounted=2)
    async with api.engine.begin() as connection:
        await audits.store(connection, found, started_at=datetime.now(UTC), redriven=0, detail=DETAIL)

    shown = (await api.http.get("/v1/reconciliation")).json()["audit"]

    assert (shown["accepted"], shown["unaccounted"], shown["unknown"]) == (6, 2, {"service_silent": 2})
    assert shown["gaps"] == DETAIL["gaps"]


async def test_when_no_reconciler_answers_the_caller_is_told(api, monkeypatch):
    monkeypatch.setattr("gateway.routes.reconciliation.WAIT_SECONDS", 0.3)
    answer = await api.http.post("/v1/reconciliation:run")
    assert (answer.status_code, answer.json()["code"]) == (503, "reconciler_silent")


async def test_an_audit_needs_a_right_of_its_own(api):
    reader = {"Authorization": f"Bearer {await api.new_key(Scope.RECONCILIATION_READ)}"}
    answer = await api.http.post("/v1/reconciliation:run", headers=reader)
    assert answer.status_code == 403


async def test_a_grace_that_an_audit_rounds_is_found_all_the_same(api):
    found = Balance(accepted=0, waiting=0, running=0, finished=0, dead=0, unaccounted=0)
    grace = 0.1234567
    said = DETAIL | {"grace_seconds": timedelta(seconds=grace).total_seconds()}
    async with api.engine.begin() as connection:
        await audits.store(connection, found, started_at=datetime.now(UTC), redriven=0, detail=said)

        assert await audits.started_after(connection, datetime.min.replace(tzinfo=UTC), grace_seconds=grace) is not None
