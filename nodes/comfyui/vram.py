"""Room on the GPU for our own work: ComfyUI's model management is asked for it, and told when it is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from ...quant_core.models.source import Source
from ...quant_core.rounding import room


def device() -> torch.device:
    """ComfyUI's own; the CPU where that is no CUDA GPU, or ComfyUI was told not to use one."""
    chosen = comfy.model_management.get_torch_device()
    return chosen if chosen.type == "cuda" else room.CPU


@contextmanager
def rounding(source: Source, layers: Iterable[str], with_inputs: bool) -> Iterator[torch.device]:
    """The device, with room for rounding these layers; with_inputs: there is a calibration.

    Models make way as far as they must, and come back when they sample.
    """
    where = device()
    if where.type == "cpu":
        yield where
        return
    comfy.model_management.free_memory(room.needed(map(source.shape, layers), with_inputs), where)
    try:
        yield where
    finally:
        comfy.model_management.soft_empty_cache()
