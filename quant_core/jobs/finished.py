"""A finished file, ours or a peer's, decoded by the loader's own arithmetic."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..files.checkpoint import DTYPES, Checkpoint
from ..files.header import ITEMSIZE
from ..files.markers import FP8, declared_configs, provenance
from ..formats import FORMATS, SOURCE, Format, stored
from ..models import lora
from ..models.architectures import split_prefix
from ..models.diffusers import present
from ..models.modelfile import FLOATS, NATIVE
from ..models.source import apply_scale
from ..models.splitfile import find_branch
from ..planning import folds
from ..planning.folds import Fold
from ..rounding import smoothing
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import squared_distance, squared_norm
from ..rounding.split import Branch

ROWS = 1024  # rows decoded at once; a multiple of the 128-row tiles in which block scales are swizzled
SCALES = ("F32", "F16", "BF16")  # what comfy-kitchen takes as a scale

# What a format's weight may consist of in a file.
TENSORS = (
    *("weight", "weight_scale", "weight_scale_2"),
    *("weight_s_rel", "weight_s_channel", "weight_codebook"),
)


class QuantizedFile:
    """A finished file, ours or a peer's, whose layers can be decoded by comfy-kitchen's arithmetic.

    branch: where the LoRA of a split file lies; None: beside it, under the name in its header.
    """

    def __init__(self, path: str | os.PathLike[str], branch: Path | None = None) -> None:
        self.checkpoint = Checkpoint(path)
        found = find_branch(self.checkpoint, branch)
        self.branches = Checkpoint(found) if found else None
        present(self.checkpoint)  # refuses scales that ComfyUI would lose
        self.prefix = split_prefix(self.checkpoint.entries)
        self.configs = {**declared_configs(self.checkpoint), **declared_configs(self.checkpoint, self.prefix)}

    def __enter__(self) -> QuantizedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()
        if self.branches:
            self.branches.close()

    def folds(self) -> dict[str, Fold]:
        """What was folded into the file, {} for a file that does not say so."""
        return folds.parse(
            (provenance(self.checkpoint) or {}).get(folds.KEY), str(self.checkpoint.path), "quantize again"
        )

    def format(self, layer: str) -> str:
        """A key of FORMATS where the layer's is known here, else the declared name; "bf16" when it is not quantized."""
        codec = self.codec(layer)
        return codec.name if codec else self.configs.get(layer, {}).get("format", SOURCE)

    def codec(self, layer: str) -> Format | None:
        """The format that decodes this layer as its file says; None for other formats and for 16-bit layers."""
        weight = self.checkpoint.entries[layer + ".weight"]
        if layer not in self.configs:
            return FORMATS["float8_e4m3fn_unscaled"] if weight.dtype in FP8 else None
        groups = self.checkpoint.entries.get(f"{layer}.weight_s_rel")
        try:
            return stored(self.configs[layer], weight.shape, groups.shape if groups else ())
        except ValueError as e:
            where = f"{self.checkpoint.path}: layer {layer}"
            raise CalibQuantError(f"{where}: its quantization data are damaged ({e}): quantize again") from e

    def nbytes(self, layer: str) -> int:
        """Bytes of the layer's weight and of everything that belongs to its quantization, its branch too."""
        names = (*TENSORS, "input_scale", smoothing.KEY, "comfy_quant")
        entries = self.checkpoint.entries
        own = sum(entries[f"{layer}.{n}"].nbytes for n in names if f"{layer}.{n}" in entries)
        return own + (sum(self.branches.entry(key).nbytes for key in self._branch_keys(layer)) if self.branches else 0)

    def branch(self, layer: str, shape: tuple[int, ...]) -> Branch | None:
        """What the layer's LoRA adds to ``rows``; None where it has none."""
        keys = self._branch_keys(layer)
        if self.branches is None or not keys:
            return None
        up, down = (self.branches.read(key) for key in keys)
        if up.dim() != 2 or down.dim() != 2 or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise CalibQuantError(
                f"{self.branches.path}: layer {layer}: factors of {list(up.shape)} and {list(down.shape)} do not fit "
                f"{list(shape)}: quantize again"
            )
        return Branch(up, down)

    def _branch_keys(self, layer: str) -> tuple[str, ...]:
        keys = lora.keys(layer.removeprefix(self.prefix))
        return keys if self.branches and any(key in self.branches.entries for key in keys) else ()

    def rows(self, layer: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """float32 parts of the ``[out, ...]`` that acts on unscaled inputs, at most ``ROWS`` rows each."""
        codec = self.codec(layer)
        self._check(layer, codec, shape)
        tensors = self._tensors(layer, codec)
        for name, tensor in tensors.items():
            if name != "weight" and tensor.numel() == 1 and tensor.dtype.itemsize > 1:
                tensors[name] = tensor.reshape(()).float()
            elif name == "weight_s_channel":  # one for each row, so that rows can be decoded a part at a time
                tensors[name] = tensor.reshape(-1, 1)
        smooth = self.smoothing(layer)
        for start in range(0, shape[0], ROWS):
            part = {n: t[start : start + ROWS] if t.dim() > 1 else t for n, t in tensors.items()}
            size = (min(ROWS, shape[0] - start), *shape[1:])
            weight = codec.decode(part, size) if codec else part["weight"].float()
            yield weight if smooth is None else weight * smooth

    def bias(self, layer: str) -> torch.Tensor | None:
        """float32 [out], None where there is none."""
        return self._optional(f"{layer}.bias")

    def runs_as(self, layer: str) -> LayerPlan:
        """What the loader will do with the layer's inputs, as a plan's entry."""
        scale = self._optional(f"{layer}.input_scale", 1)
        full_precision = bool(self.configs.get(layer, {}).get("full_precision_matrix_mult"))
        return LayerPlan(self.format(layer), "", full_precision, None if scale is None else float(scale))

    def smoothing(self, layer: str) -> torch.Tensor | None:
        """``pre_quant_scale`` as float32 [in], None where there is none."""
        return self._optional(f"{layer}.{smoothing.KEY}")

    def _optional(self, key: str, size: int | None = None) -> torch.Tensor | None:
        """A vector (or number, of size 1) that a layer may have, as float32."""
        if key not in self.checkpoint.entries:
            return None
        entry = self.checkpoint.entries[key]
        if entry.dtype not in FLOATS or len(entry.shape) > 1 or size not in (None, math.prod(entry.shape)):
            raise self._misfit(key, "one number" if size else "a vector of floats")
        return self.checkpoint.read(key).float()

    def _misfit(self, key: str, wanted: str) -> CalibQuantError:
        entry = self.checkpoint.entry(key)
        layer, _, name = key.rpartition(".")
        return CalibQuantError(
            f"{self.checkpoint.path}: layer {layer}: {name} is {entry.dtype} {list(entry.shape)}, wanted is {wanted}: "
            "the file is damaged, or of another model: quantize again"
        )

    def _check(self, layer: str, codec: Format | None, shape: tuple[int, ...]) -> None:
        """Every tensor of a layer [out, ...] is what its format is decoded from; its optional vectors fit, too.

        A scale in bytes may be stored under another dtype of one byte, a single number in any shape and float dtype.
        """
        fmt = self.format(layer)
        if codec is None and fmt not in ("float8_e5m2", SOURCE):
            raise CalibQuantError(f"{self.checkpoint.path}: layer {layer}: format {fmt} cannot be decoded here")
        layout = codec.layout(shape) if codec and len(shape) == 2 else {"weight": (None, shape)}
        for suffix, (dtype, wanted) in layout.items():
            if suffix == "weight_codebook" and f"{layer}.{suffix}" not in self.checkpoint.entries:
                continue  # a peer's W4A8 may do without
            entry = self.checkpoint.entry(f"{layer}.{suffix}")
            fits, single = DTYPES[entry.dtype] == dtype, False
            if dtype is None:
                fits = entry.dtype in FLOATS
            elif suffix != "weight":
                floats = dtype.itemsize > 1 or suffix == "weight_s_rel"  # W4A8's may be either
                fits = (entry.dtype in SCALES and floats) or dtype.itemsize == 1 == ITEMSIZE[entry.dtype]
                single = dtype == torch.float32 and math.prod(entry.shape) == 1
            if not fits or not (entry.shape == wanted or single):
                name = "a float dtype" if dtype is None else str(dtype).removeprefix("torch.")
                raise self._misfit(f"{layer}.{suffix}", f"{name} {list(wanted)}")
        self._optional(f"{layer}.bias", shape[0])
        self._optional(f"{layer}.{smoothing.KEY}", math.prod(shape[1:]))

    def _tensors(self, layer: str, codec: Format | None) -> dict[str, torch.Tensor]:
        path, read, fmt = self.checkpoint.path, self.checkpoint.read, self.format(layer)
        if fmt == "float8_e5m2":
            return {"weight": apply_scale(path, layer, read(layer + ".weight"), read(layer + NATIVE.scale))}
        names = TENSORS if codec else ("weight",)
        return {n: read(f"{layer}.{n}") for n in names if f"{layer}.{n}" in self.checkpoint.entries}


def layer_error(source: torch.Tensor, quantized: QuantizedFile, layer: str) -> float:
    """||W - Q||^2 / ||W||^2 of one layer; 0 for an all-zero weight that stayed zero."""
    error = energy = 0.0
    branch = quantized.branch(layer, tuple(source.shape))
    for start, part in zip(range(0, source.shape[0], ROWS), quantized.rows(layer, tuple(source.shape)), strict=True):
        weight = source[start : start + ROWS].float()
        if branch is not None:
            part = part + branch.up[start : start + ROWS].float() @ branch.down.float()
        error += squared_distance(weight, part)
        energy += squared_norm(weight)
    return error / energy if energy else error
