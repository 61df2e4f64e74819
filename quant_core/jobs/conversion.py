"""Another tool's FP8 dialect into ComfyUI's native one, codes bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibQuantError
from ..files.checkpoint import DTYPES, TensorSpec, Writer
from ..files.markers import METADATA_KEY
from ..models.modelfile import NATIVE
from ..models.source import Source
from ..planning.layout import encode_config
from ..progress import Progress
from .quantization import refuse_itself


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """HSWQ V2 (``.scale``) or legacy ``scaled_fp8`` -> ComfyUI's native dialect; codes are kept bit for bit.

    Conv weights, and whatever else is no Linear, have no scale in the native dialect and become the model's 16-bit
    dtype. Returns how many layers and how many of those were converted. Raises CalibQuantError when there is nothing
    to convert.
    """
    output = Path(output)
    with Source(path) as source:
        refuse_itself(source.checkpoint, output)
        if source.dialect is None or source.dialect is NATIVE:
            what = "is in the native dialect already" if source.dialect else "has no FP8 weights with a scale"
            raise CalibQuantError(f"{source.path}: {what}: nothing to convert")
        scaled = [name for name, info in source.layers.items() if source.scale_key(name) and not info.not_linear]
        layers = {name: _native_tensors(source, name) for name in scaled}
        specs = _converted_specs(source, layers)
        configs = {name: json.loads(bytes(t["comfy_quant"].tolist())) for name, t in layers.items()}
        kept = {k: v for k, v in source.checkpoint.metadata.items() if k != METADATA_KEY}
        metadata = {**kept, METADATA_KEY: json.dumps({"format_version": "1.0", "layers": configs})}
        converted = 0
        with Writer(output, specs, metadata, overwrite) as writer:
            for i, spec in enumerate(specs):
                if progress:
                    progress(i, len(specs), spec.name)
                layer, _, suffix = spec.name.rpartition(".")
                if layer in layers and suffix in layers[layer]:
                    writer.write(spec.name, layers[layer][suffix])
                elif source.is_scaled(spec.name) and layer not in layers:
                    writer.write(spec.name, source.load(layer).to(spec.dtype))
                    converted += 1
                else:
                    writer.write_chunks(spec.name, source.checkpoint.chunks(spec.name))
        return {"layers": len(layers), "convolutions": converted}


def _native_tensors(source: Source, layer: str) -> dict[str, torch.Tensor]:
    """The small tensors that make a layer native; the codes themselves are copied."""
    dialect, read = source.dialect, source.checkpoint.read
    scale = read(layer + dialect.scale).float()
    if scale.numel() != 1:
        raise CalibQuantError(
            f"{source.path}: layer {layer} has {scale.numel()} scales, native FP8 takes one: use calibquant quantize"
        )
    tensors = {"weight_scale": scale.reshape(())}
    input_key = layer + dialect.input_scale if dialect.input_scale else ""
    if input_key in source.checkpoint.entries:
        value = read(input_key).float()
        if value.numel() != 1:
            raise CalibQuantError(
                f"{source.path}: layer {layer}: {input_key} has {value.numel()} elements, not one: download it again"
            )
        value = value.reshape(())
        if value != 1.0:  # the legacy loader takes 1.0 as "not given"
            tensors["input_scale"] = value
    e5m2 = source.checkpoint.entries[layer + ".weight"].dtype == "F8_E5M2"
    config: dict[str, Any] = {"format": "float8_e5m2" if e5m2 else "float8_e4m3fn"}
    if _weight_only(source) and "input_scale" not in tensors:
        config["full_precision_matrix_mult"] = True
    return {**tensors, "comfy_quant": encode_config(config)}


def _weight_only(source: Source) -> bool:
    """HSWQ files were made for 16-bit activations; a legacy file says so by a marker of two elements."""
    marker = source.prefix + (source.dialect.marker or "")
    if not source.dialect.marker:
        return True
    return marker in source.checkpoint.entries and source.checkpoint.entries[marker].shape == (2,)


def _converted_specs(source: Source, layers: Mapping[str, Mapping[str, torch.Tensor]]) -> list[TensorSpec]:
    specs = []
    for key, entry in source.checkpoint.entries.items():
        layer = key.removesuffix(".weight")
        if key in source.consumed:
            continue
        as_is = layer in layers or not source.is_scaled(key)
        specs.append(TensorSpec(key, DTYPES[entry.dtype] if as_is else source.model_dtype(layer), entry.shape))
        if key.endswith(".weight") and layer in layers:
            specs += [TensorSpec(f"{layer}.{n}", t.dtype, tuple(t.shape)) for n, t in layers[layer].items()]
    return specs
