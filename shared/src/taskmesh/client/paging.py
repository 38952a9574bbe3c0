"""Lists that come in pages, each with a cursor to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from taskmesh.client.exchange import Emit, Operation, Patience, Request, call


class Page(Protocol):
    """What every page of a list has."""

    @property
    def items(self) -> Sequence[object]: ...
    @property
    def next_cursor(self) -> str | None: ...
    @classmethod
    def model_validate_json(cls, json_data: bytes, /) -> Self: ...


def emit_pages(
    path: str,
    query: tuple[tuple[str, str], ...],
    page_type: type[Page],
    *,
    limit: int | None,
    page_size: int,
    patience: Patience,
) -> Operation[None]:
    """Emit the items of a list, up to `limit`, fetching a page only when its first item is wanted."""
    cursor: str | None = None
    left = limit
    while left is None or left > 0:
        size = page_size if left is None else min(page_size, left)
        paging = (("limit", str(size)), *((("cursor", cursor),) if cursor else ()))
        answer = yield from call(Request(method="GET", path=path, query=(*query, *paging), repeatable=True), patience)
        page = page_type.model_validate_json(answer.body)
        for item in page.items[:left]:
            yield Emit(item)
        if left is not None:
            left -= len(page.items)
        cursor = page.next_cursor
        if not cursor:
            return


def collect(operation: Operation[None]) -> Operation[list[Any]]:
    """All that an operation emits, in one list."""
    items: list[Any] = []
    outcome: Any = None
    while True:
        try:
            step = operation.send(outcome)
        except StopIteration:
            return items
        if isinstance(step, Emit):
            items.append(step.value)
            outcome = None
        else:
            outcome = yield step
