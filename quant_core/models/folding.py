"""Folding: a factor per channel moved from what makes a layer's input into the layer's columns.

With y = W x and x made by linear steps, x / s and W * s (column by column) give the same y, for any s. Dividing is
folded into the weights that make x, so the file needs nothing of its loader: norm weights, value rows of attention, the
linear arm of a gated MLP, a block's own modulation (1 + scale) / s = 1 + (scale / s + 1 / s - 1). With powers of two
all of it is exact in every float dtype, but for the biases of such a modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..files.header import TensorEntry
from ..files.markers import FP8
from .families.row import Bound, Consumer, FoldRule, Producer
from .modelfile import FLOATS, ModelFile

# Checkpoint key -> function on the float32 tensor of that key.
Merge = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


def merged(tensor: torch.Tensor, key: str, merge: Merge) -> torch.Tensor:
    """What ``merge`` makes of the tensor of this key, float32; the tensor itself where it does nothing to it."""
    return merge[key](tensor.float()) if key in merge else tensor


@dataclass(frozen=True)
class Part:
    """Columns (of a consumer) or rows (of a producer) start … stop of a module, named as in the file."""

    module: str
    start: int
    stop: int
    plus_one: bool = False


@dataclass(frozen=True)
class Group:
    """Channels of one file that may get a factor each: ``width`` rows of every producer.

    Consumers have ``repeat`` times as many columns: heads of ``head`` channels, each ``repeat`` times in succession.
    """

    width: int
    head: int
    repeat: int
    consumers: tuple[Part, ...]
    producers: tuple[Part, ...]

    def spread(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors [width] for the consumers' columns."""
        return factors.view(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        """The mean over the columns that share a factor, [width]."""
        return columns.view(-1, self.repeat, self.head).mean(1).reshape(-1)

    def along(self, part: Part, factors: torch.Tensor, columns: int) -> torch.Tensor:
        """Factors [width] for all ``columns`` inputs of a consumer, 1 where it does not take part."""
        whole = torch.ones(columns)
        whole[part.start : part.stop] = self.spread(factors)
        return whole


def groups(file: ModelFile) -> dict[str, Group]:
    """What may be folded in this file, by the first consumer's name without prefix, in the order of the file."""
    found = {}
    for layer, info in file.layers.items():
        for rule in file.architecture.folds if info.block is not None else ():
            group = (
                _resolved(file, rule, layer.removesuffix(info.kind)) if info.kind == rule.consumers[0].kind else None
            )
            if group:
                found[file.short(layer)] = group
    return found


def functions(file: ModelFile, factors: Mapping[str, torch.Tensor]) -> Merge:
    """What folding s, float32 [width] by group, does to each tensor of the file that it touches."""
    known, changes = groups(file), dict[str, _Change]()
    for name, s in factors.items():
        group = known[name]
        for part in group.consumers:
            changes.setdefault(f"{part.module}.weight", _Change()).multiply_columns(
                group.along(part, s, file.shape(part.module)[1])
            )
        for part in group.producers:
            for key in (f"{part.module}.weight", f"{part.module}.bias"):
                if key in file.checkpoint.entries:
                    change = changes.setdefault(key, _Change())
                    change.multiply_rows(part, 1 / s, file.shape(part.module)[0], key.endswith(".bias"))
    return changes


def input_factors(file: ModelFile, factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What folding s does to the inputs of each consumer, named without prefix: float32 [in] to multiply by."""
    known, inputs = groups(file), dict[str, torch.Tensor]()
    for name, s in factors.items():
        for part in known[name].consumers:
            layer, whole = file.short(part.module), torch.ones(file.shape(part.module)[1])
            inputs[layer] = inputs.get(layer, whole) / known[name].along(part, s, len(whole))
    return inputs


def output_factors(file: ModelFile, factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What folding s does to the outputs of each layer that produces, named without prefix: float32 [out]."""
    known, outputs = groups(file), dict[str, torch.Tensor]()
    for name, s in factors.items():
        for part in known[name].producers:
            if part.module in file.layers:  # a norm is none
                layer, whole = file.short(part.module), torch.ones(file.shape(part.module)[0])
                outputs.setdefault(layer, whole)[part.start : part.stop] /= s
    return outputs


class _Change:
    """Factors of rows and columns, and what is added; several folds may touch one tensor."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None
        self._columns: torch.Tensor | None = None
        self._added: torch.Tensor | None = None

    def multiply_columns(self, factors: torch.Tensor) -> None:
        self._columns = factors if self._columns is None else self._columns * factors

    def multiply_rows(self, part: Part, factors: torch.Tensor, rows: int, bias: bool) -> None:
        self._rows = torch.ones(rows) if self._rows is None else self._rows
        self._rows[part.start : part.stop] *= factors
        if bias and part.plus_one:
            self._added = torch.zeros(rows) if self._added is None else self._added
            self._added[part.start : part.stop] += factors - 1

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._rows is not None:
            tensor = tensor * self._rows.view(-1, *[1] * (tensor.dim() - 1))
        if self._columns is not None:
            tensor = tensor * self._columns
        return tensor if self._added is None else tensor + self._added


def _resolved(file: ModelFile, rule: FoldRule, block: str) -> Group | None:
    """The rule in one block; None where a tensor is missing, of another shape, or has no room for factors."""
    consumers = [_part(file, block, one) for one in rule.consumers]
    wanted = [one for one in rule.producers if not (one.optional and f"{block}{one.kind}.weight" not in _keys(file))]
    producers = [_part(file, block, one) for one in wanted]
    if None in consumers or None in producers:
        return None
    columns, rows = ({part.stop - part.start for part in parts if part} for parts in (consumers, producers))
    if len(columns) != 1 or len(rows) != 1:
        return None
    (width,), (repeat, rest) = rows, divmod(columns.pop(), *rows)
    head = width if repeat == 1 else _length(file, f"{block}{rule.head}.weight")
    if rest or not repeat or not head or width % head:
        return None
    return Group(width, head, repeat, tuple(p for p in consumers if p), tuple(p for p in producers if p))


def _part(file: ModelFile, block: str, one: Consumer | Producer) -> Part | None:
    module, keys = block + one.kind, _keys(file)
    entry, bias = keys.get(f"{module}.weight"), keys.get(f"{module}.bias")
    if entry is None or entry.dtype not in FLOATS or len(entry.shape) > 2:
        return None
    if entry.dtype in FP8 and not file.scale_key(module):  # kept as it is, factors would leave its narrow range
        return None
    produces = isinstance(one, Producer)
    if produces and bias is not None and bias.shape != entry.shape[:1]:
        return None
    if (produces and one.plus_one and bias is None) or (not produces and module not in file.layers):
        return None
    shape = (*entry.shape, 0)[:2]
    start, stop = (_place(bound, shape) for bound in (one.start, one.stop))
    if start is None or stop is None or not start < stop <= shape[0 if produces else 1]:
        return None
    return Part(module, start, stop, produces and one.plus_one)


def _place(bound: Bound, shape: tuple[int, ...]) -> int | None:
    place = bound[0] * shape[0] + bound[1] * shape[1]
    return int(place) if place == int(place) else None


def _length(file: ModelFile, key: str) -> int:
    return _keys(file)[key].shape[0] if key in _keys(file) and _keys(file)[key].shape else 0


def _keys(file: ModelFile) -> Mapping[str, TensorEntry]:
    return file.checkpoint.entries
