"""Rounded layers as a loader runs them, before a file of them is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..errors import CalibQuantError
from ..formats import FORMATS, FileTensors
from .choice import Rounder
from .judge import as_loaded
from .layerplan import LayerPlan


@dataclass(frozen=True)
class LoadedLayer:
    """A Linear of a file's tensors: rounds its inputs [..., in] as the loader does, and multiplies.

    entry: its full_precision says whether inputs stay as they are on the card in question.
    """

    entry: LayerPlan
    shape: tuple[int, ...]
    tensors: FileTensors
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        fmt = FORMATS[self.entry.format]
        weight = fmt.decode({name: each.to(x.device) for name, each in self.tensors.items()}, self.shape)
        rows = as_loaded(fmt, x.reshape(-1, x.shape[-1]).float(), self.entry)
        bias = None if self.bias is None else self.bias.to(x)
        return F.linear(rows.to(x.dtype), weight.to(x.dtype), bias).view(*x.shape[:-1], self.shape[0])


# Layer -> its weight [out, in], and its bias
Read = Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]


class Shelf:
    """Layers of one model, each rounded once for each entry of a plan; memory as of the files that hold them.

    where: begins error messages. rounds_inputs: whether the card in question rounds the inputs of an entry's layer.
    """

    def __init__(self, rounder: Rounder, read: Read, where: str, rounds_inputs: Callable[[LayerPlan], bool]) -> None:
        self._rounder, self._read, self._where, self._rounds_inputs = rounder, read, where, rounds_inputs
        self._made: dict[tuple[str, LayerPlan], LoadedLayer] = {}

    def layers(
        self, entries: Mapping[str, LayerPlan], tick: Callable[[int, int, str], None] = lambda *_: None
    ) -> dict[str, LoadedLayer]:
        """The layers of these entries. CalibQuantError for an entry that more than its own layer's tensors make up."""
        found = {}
        for i, (name, entry) in enumerate(entries.items()):
            tick(i, len(entries), name)
            found[name] = self._layer(name, replace(entry, reason=""))
        return found

    def _layer(self, name: str, entry: LayerPlan) -> LoadedLayer:
        if (name, entry) not in self._made:
            where = f"{self._where}: layer {name}"
            if entry.rank or entry.pre_quant_scale:
                what = "a branch" if entry.rank else "smoothed inputs"
                raise CalibQuantError(f"{where}: has {what}, which cannot be sampled before it is saved: plan without")
            weight, bias = self._read(name)
            done = self._rounder.round(name, entry, weight, where, bias)
            run = replace(entry, full_precision=not self._rounds_inputs(entry))
            kept = bias if done.bias is None else done.bias
            self._made[name, entry] = LoadedLayer(run, tuple(weight.shape), done.packed.tensors, kept)
        return self._made[name, entry]
