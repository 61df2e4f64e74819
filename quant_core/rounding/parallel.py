"""All cores for the parts of one tensor: several threads of ours, torch on one thread in each.

torch's own way, many short parallel regions that wait for their slowest thread, collapses when another program takes a
core: a job of 10 CPU seconds took 209 s with two of its threads and 21 s with one (2 cores, load up to 8, n = 1).
Parts that nobody waits for just take their share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


class Each(Protocol):
    """``map`` whose results are all there, in order; the first part's error, of several, is raised."""

    def __call__(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]: ...


@contextmanager
def threads(count: int) -> Iterator[Executor]:
    """Threads that run torch on one thread each. Leaving the block waits for calls under way and drops the others."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # a thread's own number is also that of all threads to come


_cores = threading.local()  # count: of threads that torch had outside of one_thread


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, for results that do not hang on how many it has: sums and LAPACK's factors do, in their last
    bits. What is done by ``workers`` inside the block still has them all.
    """
    before, outside = torch.get_num_threads(), getattr(_cores, "count", None)
    _cores.count = outside or before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _cores.count = outside


@contextmanager
def workers(device: torch.device) -> Iterator[Each]:
    """As many threads as torch may use here; the caller's thread, too, runs torch on one until the block ends.

    On a GPU parts are done one after another, as its kernels are.
    """
    before = torch.get_num_threads()
    count = getattr(_cores, "count", None) or before
    if count == 1 or device.type != "cpu":
        yield lambda function, parts: list(map(function, parts))
        return
    with threads(count) as pool:
        torch.set_num_threads(1)
        try:
            yield lambda function, parts: list(pool.map(_in_mode_of_caller(function), parts))
        finally:
            torch.set_num_threads(before)


def _in_mode_of_caller(function: Callable[[Part], Result]) -> Callable[[Part], Result]:
    """A thread's inference mode is its own, and outside of it nothing may be written into the caller's tensors."""
    inference = torch.is_inference_mode_enabled()  # ComfyUI runs nodes in it

    def call(part: Part) -> Result:
        with torch.inference_mode(inference):
            return function(part)

    return call
