"""What a caller can ask of worker services, as operations without I/O (exchange.py)."""

from __future__ import annotations

from urllib.parse import quote

from taskmesh.client.exchange import Operation, Patience, Request, call
from taskmesh.client.results import Service, Services


def list_services(patience: Patience) -> Operation[tuple[Service, ...]]:
    """Every worker service that has announced itself."""
    answer = yield from call(Request(method="GET", path="/v1/services", repeatable=True), patience)
    return Services.model_validate_json(answer.body).items


def pause(service: str, reason: str | None, patience: Patience) -> Operation[Service]:
    """Have its workers take no more tasks."""
    return (yield from _order(service, "pause", {} if reason is None else {"reason": reason}, patience))


def resume(service: str, patience: Patience) -> Operation[Service]:
    """Have its workers take tasks again."""
    return (yield from _order(service, "resume", None, patience))


def _order(service: str, verb: str, body: dict[str, str] | None, patience: Patience) -> Operation[Service]:
    path = f"/v1/services/{quote(service, safe='')}:{verb}"
    answer = yield from call(Request(method="POST", path=path, body=body, repeatable=True), patience)
    return Service.model_validate_json(answer.body)
