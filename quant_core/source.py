"""A model to be quantized: a checkpoint whose layers, family and FP8 dialect are known.

FP8 files with scales come in three dialects. Each is one row of ``DIALECTS``; their weights are multiplied by
their scale when read, so that everything downstream sees the real weights.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .architectures import Architecture, LayerInfo, by_name, detect, split_prefix
from .checkpoint import DTYPES, Checkpoint, TensorEntry
from .errors import CalibQuantError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FP8 = ("F8_E4M3", "F8_E5M2")
METADATA_KEY = "_quantization_metadata"


@dataclass(frozen=True)
class Dialect:
    """How one kind of FP8 file names its scales. Suffixes replace ``.weight``; marker is a key of the whole file."""

    name: str
    title: str
    scale: str
    input_scale: str | None = None
    marker: str | None = None
    metadata: str | None = None


NATIVE = Dialect("native", "ComfyUI native (comfy_quant)", ".weight_scale", ".input_scale")
DIALECTS = (
    NATIVE,
    Dialect("scaled_fp8", "legacy scaled_fp8", ".scale_weight", ".scale_input", marker="scaled_fp8"),
    Dialect("hswq", "HSWQ V2 (.scale)", ".scale"),
)


class Source:
    """A 16/32-bit (or scaled FP8) diffusion model, open for reading.

    ``layers`` maps each quantizable layer (a 2-D Linear weight of the diffusion model, named as in the checkpoint
    without ``.weight``) to what the architecture table knows of it. ``prefix`` is what the diffusion model's keys
    begin with in this file; all other keys (CLIP, VAE of an all-in-one checkpoint) are copied untouched.

    Raises CalibQuantError for a file that is quantized already (anything but FP8) or holds no layer to quantize.
    """

    def __init__(self, path: str | os.PathLike[str], architecture: str | None = None) -> None:
        self.checkpoint = Checkpoint(path)
        self.path = self.checkpoint.path
        keys = self.checkpoint.entries
        _refuse_lora(self.path, keys)
        self.prefix = split_prefix(keys)
        self._refuse_quantized()
        self.dialect = self._dialect()
        model_shapes = {k: e.shape for k, e in keys.items() if k.startswith(self.prefix)}
        self.architecture: Architecture = by_name(architecture) if architecture else detect(model_shapes, model_shapes)
        self.consumed = self._consumed_keys()
        weights = [k for k, e in keys.items() if self._is_weight(k, e)]
        self.layers: dict[str, LayerInfo] = {
            layer: self.architecture.describe(layer)
            for layer in (k.removesuffix(".weight") for k in weights if len(keys[k].shape) == 2)
        }
        self.convolutions = [k.removesuffix(".weight") for k in weights if len(keys[k].shape) in (4, 5)]
        if not any(info.block is not None for info in self.layers.values()):
            raise CalibQuantError(
                f"{self.path}: no Linear layer inside a numbered block: this is no diffusion model that can be "
                "quantized here"
            )

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    @property
    def name(self) -> str:
        return self.path.name

    def shape(self, layer: str) -> tuple[int, ...]:
        return self.checkpoint.entries[layer + ".weight"].shape

    def scale_key(self, layer: str) -> str | None:
        """The key of the scale that this layer's FP8 weight must be multiplied by."""
        key = layer + self.dialect.scale if self.dialect else None
        stored_as_fp8 = self.checkpoint.entries[layer + ".weight"].dtype in FP8
        return key if stored_as_fp8 and key in self.checkpoint.entries else None

    def is_scaled(self, key: str) -> bool:
        """Whether this key is an FP8 weight with a scale of its own."""
        is_weight = key.endswith(".weight") and key.startswith(self.prefix)
        return is_weight and self.scale_key(key.removesuffix(".weight")) is not None

    def load(self, layer: str) -> torch.Tensor:
        """The real weight ``[out, in]`` in the dtype on disk, or in float32 where an FP8 scale was applied.

        Raises CalibQuantError when the scale does not fit the weight.
        """
        weight = self.checkpoint.read(layer + ".weight")
        key = self.scale_key(layer)
        if key is None:
            return weight
        return apply_scale(self.path, layer, weight, self.checkpoint.read(key))

    def kept_dtype(self, layer: str) -> torch.dtype:
        """The dtype in which the weight is written when a plan leaves it alone."""
        if self.scale_key(layer):
            return self.model_dtype
        return DTYPES[self.checkpoint.entries[layer + ".weight"].dtype]

    @property
    def model_dtype(self) -> torch.dtype:
        """The 16/32-bit dtype that most tensors of the diffusion model have; bfloat16 when none has one."""
        wide = Counter(
            e.dtype
            for k, e in self.checkpoint.entries.items()
            if k.startswith(self.prefix) and e.dtype in ("BF16", "F16") and k.endswith((".weight", ".bias"))
        )
        return DTYPES[wide.most_common(1)[0][0]] if wide else torch.bfloat16

    def warnings(self) -> list[str]:
        """What the user should know before quantizing this file."""
        fp8 = [n for n in self.layers if self.checkpoint.entries[n + ".weight"].dtype in FP8]
        unscaled = [n for n in fp8 if not self.scale_key(n)]
        notes = []
        if unscaled:
            notes.append(f"{len(unscaled)} layers are FP8 without a scale: what that cast lost cannot be restored")
        elif fp8:
            notes.append(f"{len(fp8)} layers are scaled FP8, dequantized first: a 16-bit source gives less error")
        if self.architecture.name == "generic":
            notes.append("unknown architecture: everything outside numbered blocks stays in the source dtype")
        return notes

    def _is_weight(self, key: str, entry: TensorEntry) -> bool:
        return key.startswith(self.prefix) and key.endswith(".weight") and entry.dtype in FLOATS

    def _dialect(self) -> Dialect | None:
        keys = self.checkpoint.entries
        fp8 = [k.removesuffix(".weight") for k, e in keys.items() if self._is_weight(k, e) and e.dtype in FP8]
        found = [d for d in DIALECTS if any(layer + d.scale in keys for layer in fp8)]
        if len(found) > 1:
            names = " and ".join(d.title for d in found)
            raise CalibQuantError(f"{self.path}: mixes the FP8 dialects {names}: quantize from the 16-bit original")
        return found[0] if found else None

    def _consumed_keys(self) -> frozenset[str]:
        """Keys that belong to the source's own quantization and must not reach the output."""
        if not self.dialect:
            return frozenset()
        suffixes = [s for s in (self.dialect.scale, self.dialect.input_scale, ".comfy_quant") if s]
        markers = {self.prefix + self.dialect.marker, self.dialect.marker} if self.dialect.marker else set()
        return frozenset(
            key
            for key in self.checkpoint.entries
            if key in markers or any(key.endswith(s) and self._has_weight(key, s) for s in suffixes)
        )

    def _has_weight(self, key: str, suffix: str) -> bool:
        return key.startswith(self.prefix) and key.removesuffix(suffix) + ".weight" in self.checkpoint.entries

    def _refuse_quantized(self) -> None:
        for layer, fmt in declared_formats(self.checkpoint, self.prefix).items():
            if not fmt.startswith("float8_"):
                raise CalibQuantError(_already(self.path, layer, fmt))
        for key, entry in self.checkpoint.entries.items():
            if key.startswith(self.prefix) and key.endswith(".weight") and entry.dtype not in FLOATS:
                raise CalibQuantError(_already(self.path, key.removesuffix(".weight"), entry.dtype))
            if key.startswith(self.prefix) and entry.dtype == "F8_E8M0":
                raise CalibQuantError(_already(self.path, key.rpartition(".")[0], "mxfp8"))


def apply_scale(path: Path, layer: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 weight * scale for a scale of one element or one per output row."""
    scale = scale.float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(())
    if scale.numel() == weight.shape[0]:
        return weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    raise CalibQuantError(
        f"{path}: layer {layer} has a scale of shape {tuple(scale.shape)}, which is neither per tensor nor per row: "
        "quantize from the 16-bit original"
    )


def declared_formats(checkpoint: Checkpoint, prefix: str = "") -> dict[str, str]:
    """Layer -> format as the file itself declares it, inline or in the header; a contradiction is an error."""
    formats: dict[str, str] = {}
    for layer, config in header_layers(checkpoint).items():
        if layer.startswith(prefix) or layer + ".weight" not in checkpoint.entries:
            formats[layer if layer + ".weight" in checkpoint.entries else prefix + layer] = _format(
                checkpoint.path, layer, config
            )
    for key in checkpoint.entries:
        if key.endswith(".comfy_quant") and key.startswith(prefix):
            layer = key.removesuffix(".comfy_quant")
            inline = _format(checkpoint.path, layer, read_config(checkpoint, layer))
            if formats.setdefault(layer, inline) != inline:
                raise CalibQuantError(
                    f"{checkpoint.path}: layer {layer} is {inline} by its comfy_quant tensor and {formats[layer]} by "
                    "the header: one of the two is wrong"
                )
    return formats


def header_layers(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``layers`` object of the header's ``_quantization_metadata`` ({} without one)."""
    try:
        layers = json.loads(checkpoint.metadata.get(METADATA_KEY, '{"layers": {}}'))["layers"]
        return dict(layers)
    except (ValueError, KeyError, TypeError) as e:
        raise CalibQuantError(f"{checkpoint.path}: {METADATA_KEY} in the header is damaged ({e})") from e


def read_config(checkpoint: Checkpoint, layer: str) -> Any:
    """The JSON of a layer's inline ``comfy_quant`` tensor."""
    try:
        return json.loads(bytes(checkpoint.read(layer + ".comfy_quant").tolist()))
    except ValueError as e:
        raise CalibQuantError(f"{checkpoint.path}: layer {layer} has a damaged comfy_quant tensor ({e})") from e


def _format(path: Path, layer: str, config: Any) -> str:
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise CalibQuantError(f"{path}: layer {layer} has quantization data without a format: the file is damaged")
    return config["format"]


def _already(path: Path, layer: str, fmt: str) -> str:
    return f"{path}: layer {layer} is quantized already ({fmt}): quantize from the 16-bit original"


def _refuse_lora(path: Path, keys: dict[str, TensorEntry]) -> None:
    if any(".lora_up." in k or ".lora_A." in k or ".lora_B." in k for k in keys):
        raise CalibQuantError(f"{path}: is a LoRA, not a model: give the diffusion model itself")
