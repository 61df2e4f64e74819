"""One layer of a quantized file: rounded, under the names that it has there, with its report."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import FileTensors
from ..models import folding, lora
from ..models.folding import Merge
from ..models.source import Source
from ..planning.layout import encode_config, layer_config
from ..reports.report import LayerReport
from ..rounding.choice import Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import refuse_damaged


class Made(NamedTuple):
    """tensors: by their keys, the layer's bias among them. branch: those of a split layer's LoRA."""

    tensors: FileTensors
    report: LayerReport
    branch: FileTensors


def rounded(source: Source, layer: str, entry: LayerPlan, weight: torch.Tensor, rounder: Rounder, merge: Merge) -> Made:
    """The layer whose weight was read as ``weight``, with its patches, rounded as planned."""
    weight, bias = folding.merged(weight, f"{layer}.weight", merge), _bias(source, layer, merge)
    done = rounder.round(layer, entry, weight, f"{source.path}: layer {layer}", bias)
    packed, tensors = done.packed, {**done.packed.tensors}
    if entry.input_scale is not None:
        tensors["input_scale"] = torch.tensor(entry.input_scale, dtype=torch.float32)
    tensors |= done.extra
    config = layer_config(entry, source.shape(layer))
    if config is not None:
        tensors["comfy_quant"] = encode_config(config)
    nbytes = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    error = packed.error / packed.energy if packed.energy else packed.error
    report = LayerReport(
        layer,
        entry.format,
        error,
        source.shape(layer),
        nbytes,
        entry.reason,
        done.gains,
        done.rounding,
        done.note,
        done.output_errors,
        done.loader_error,
        0.0 if done.bias is None or bias is None else (done.bias.float() - bias.float()).norm().item(),
        done.held_out,
        entry.rank,
        done.unsplit_error,
        done.fallback,
    )
    stored = {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if bias is not None:
        stored[bias_key(layer)] = bias if done.bias is None else done.bias
    factors = {}
    if done.branch:
        keys = lora.keys(source.short(layer))
        factors = dict(zip(keys, (done.branch.up, done.branch.down), strict=True))
    return Made(stored, report, factors)


def bias_key(layer: str) -> str:
    return f"{layer}.bias"


def _bias(source: Source, layer: str, merge: Merge) -> torch.Tensor | None:
    """The layer's bias [out] with its patches, in the dtype it is kept in; None where there is none."""
    key = bias_key(layer)
    if key not in source.checkpoint.entries:
        return None
    bias = source.checkpoint.read(key)
    patched = folding.merged(bias, key, merge).to(bias.dtype)
    refuse_damaged(patched, f"{source.path}: layer {layer}", "bias")
    return patched
