"""The next tensor is read and the last one written while one is rounded; no more than one of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


def ahead(pool: Executor, read: Callable[[Item], Read], items: Sequence[Item]) -> Iterator[tuple[Item, Future[Read]]]:
    """Each item with what is read of it, one item ahead of the caller. ``pool`` has one thread: it keeps the order."""
    reads = (pool.submit(read, item) for item in items)
    coming = next(reads, None)
    for item in items:
        now, coming = coming, next(reads, None)
        assert now is not None
        yield item, now


class Behind:
    """Makes one call at a time in ``pool``; the next waits for it, and raises what it raised."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._last: Future[Any] | None = None

    def __call__(self, function: Callable[..., object], *args: object) -> None:
        self.wait()
        self._last = self._pool.submit(function, *args)

    def wait(self) -> None:
        if self._last:
            self._last.result()
