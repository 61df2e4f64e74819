"""GPU memory: what rounding a layer takes, and how to go on where there is less.

The ladder for a layer: whole on the GPU, in parts of its rows, on the CPU. It is for one layer at a time, because what
else lies on the GPU (ComfyUI's models, another server's) comes and goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from . import gptq

Result = TypeVar("Result")
CPU = torch.device("cpu")
PARTS = (1, 4, 16)  # of a layer, one after another on the GPU, before the CPU takes over
SIGNS = ("out of memory", "ALLOC_FAILED")  # cuBLAS and cuSOLVER say it in words of their own
WEIGHT = 16  # bytes for each weight: the source's 16 bit, three tensors in float32, codes and scales
MATRICES = 4  # float32 [in, in] at once while GPTQ's factor is made; two of them are kept
ROWS = 6  # float32 [gptq.GPU_ROWS, in] at once while GPTQ goes over the columns


@dataclass(frozen=True)
class Room:
    """Where a layer is rounded, and in how many parts of its rows."""

    device: torch.device
    parts: int = 1

    def fallback(self, wanted: torch.device) -> str:
        """What was done for want of memory; "" where all was as wanted."""
        if self.device != wanted:
            return "on the CPU"
        return f"in {self.parts} parts" if self.parts > 1 else ""


def in_room(
    device: torch.device, attempt: Callable[[Room], Result], drop: Callable[[], None] = lambda: None
) -> tuple[Result, Room]:
    """The first attempt that does not run out of the device's memory, and where it was made; drop: frees some between.

    Other errors are raised at once, as is the CPU's own want of memory.
    """
    for parts in PARTS if device.type != "cpu" else ():
        room = Room(device, parts)
        try:
            return attempt(room), room
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        drop()  # not before the error is gone, whose traceback holds on to tensors
        torch.cuda.empty_cache()
    return attempt(Room(CPU)), Room(CPU)


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def needed(shapes: Iterable[tuple[int, ...]], with_inputs: bool) -> int:
    """Bytes of GPU memory for the largest of these layers [out, in]; with_inputs: GPTQ may be tried on them.

    A few times a layer's own size; what does not fit all the same goes down the ladder.
    """
    return max((_layer(shape[0], math.prod(shape[1:]), with_inputs) for shape in shapes), default=0)


def _layer(rows: int, columns: int, with_inputs: bool) -> int:
    feedback = 4 * columns * (MATRICES * columns + ROWS * min(rows, gptq.GPU_ROWS)) if with_inputs else 0
    return WEIGHT * rows * columns + feedback
