"""A model file to be quantized: its family, its layers, its FP8 dialect. Headers only, no torch.

FP8 files with scales come in dialects. Each is one row of ``DIALECTS``; their weights are multiplied by their scale
when read (``source``), so that everything downstream sees the real weights.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalibQuantError
from ..files.header import Headers, TensorEntry
from ..files.markers import FP8, declared_formats
from ..files.text import gigabytes
from . import parts
from .architectures import Architecture, LayerInfo, by_name, detect, split_prefix
from .diffusers import present
from .parts import KINDS, Part

if TYPE_CHECKING:
    from typing_extensions import Self

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


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
    # A factor in spite of its name: DeepSeek's, and what transformers writes (FineGrainedFP8Config).
    Dialect("blocks", "FP8 of transformers (.weight_scale_inv)", ".weight_scale_inv", ".activation_scale"),
)
SCALE_BLOCK = 128  # rows and columns that share a scale in files with a matrix of them


class ModelFile:
    """A 16/32-bit (or scaled FP8) diffusion model, open for reading.

    Of a file in diffusers layout everything here is named and joined as ComfyUI does it (``diffusers``).
    ``layers`` maps each layer (a 2-D weight of the chosen parts, named as in the checkpoint without ``.weight``) to
    what the architecture table knows of it, and whether the loader runs it as a Linear. ``prefix`` is what the
    diffusion model's keys begin with in this file. ``kinds`` chooses parts of an all-in-one checkpoint (keys of KINDS;
    by default the diffusion model alone); the keys of all others are copied untouched.

    Raises CalibQuantError for a file that is quantized already (anything but FP8 and GGUF's Q8_0) or holds no layer to
    quantize. lossy: GGUF types below Q8_0 are taken, too.
    """

    reader: type[Headers] = Headers

    def __init__(
        self,
        path: str | os.PathLike[str],
        architecture: str | None = None,
        kinds: Collection[str] = (),
        lossy: bool = False,
    ) -> None:
        self.checkpoint = self.reader(path)
        self.path = self.checkpoint.path
        _refuse_lora(self.path, self.checkpoint.entries)
        _refuse_llama(self.path, self.checkpoint.entries)
        if not lossy:
            _refuse_lossy(self.path, self.checkpoint.entries)
        present(self.checkpoint)
        keys = self.checkpoint.entries
        self.prefix = split_prefix(keys)
        model_shapes = {k: e.shape for k, e in keys.items() if k.startswith(self.prefix)}
        self.architecture: Architecture = by_name(architecture) if architecture else detect(model_shapes, model_shapes)
        main = Part(self.architecture.part, self.prefix, self.architecture)
        self.contents = parts.find(keys, main)
        self.parts = self._chosen(kinds) if kinds else [main]
        self.kinds = () if self.parts == [main] else tuple(kind for kind in KINDS if kind in kinds)
        self._scaled = [part for part in self.parts if part.architecture]
        self._refuse_quantized()
        self.dialect = self._dialect()
        self.consumed = self._consumed_keys()
        self._refuse_unknown_scales()
        weights = [k for k, _ in self._weights()]
        matrices = [k.removesuffix(".weight") for k in weights if len(keys[k].shape) == 2]
        self.layers: dict[str, LayerInfo] = {}
        for part in self._scaled:
            self.layers |= part.describe([name for name in matrices if name.startswith(part.prefix)], keys)
        self.halved = tuple(part.prefix for part in self.parts if not part.architecture and self._is_float32(part))
        self.banks = [k for k in weights if len(keys[k].shape) == 3 and ".experts." in k]
        self.convolutions = [k.removesuffix(".weight") for k in weights if len(keys[k].shape) in (4, 5)]
        self._refuse_unread()
        if not self.halved and not any(info.block is not None for info in self.layers.values()):
            self._refuse_unscaled()
            raise CalibQuantError(
                f"{self.path}: no Linear layer inside a numbered block: this is no diffusion model that can be "
                "quantized here"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    @property
    def name(self) -> str:
        return self.path.name

    def short(self, layer: str) -> str:
        """The name without its part's prefix: as calibrations know it."""
        return layer.removeprefix(self._prefix_of(layer))

    def halves(self, key: str) -> bool:
        """Whether this tensor of float32 is stored as float16: the best that loaders read of its part."""
        return key.startswith(self.halved) and self.checkpoint.entries[key].dtype == "F32"

    def shape(self, layer: str) -> tuple[int, ...]:
        return self.checkpoint.entries[layer + ".weight"].shape

    def scale_key(self, layer: str) -> str | None:
        """The key of the scale that this layer's FP8 weight must be multiplied by."""
        key = layer + self.dialect.scale if self.dialect else None
        stored_as_fp8 = self.checkpoint.entries[layer + ".weight"].dtype in FP8
        return key if stored_as_fp8 and key in self.checkpoint.entries else None

    def is_scaled(self, key: str) -> bool:
        """Whether this key is a weight stored as codes and scales: FP8 with a scale of its own, or GGUF's blocks."""
        if not (key.endswith(".weight") and self.inside(key)):
            return False
        return (
            self.checkpoint.entries[key].blocks is not None or self.scale_key(key.removesuffix(".weight")) is not None
        )

    def warnings(self) -> list[str]:
        """What the user should know before quantizing this file."""
        fp8 = [n for n in self.layers if self.checkpoint.entries[n + ".weight"].dtype in FP8]
        unscaled = [n for n in fp8 if not self.scale_key(n)]
        notes = []
        for name, count in Counter(e.blocks.name for k, e in self._weights() if e.blocks).items():
            notes.append(f"{count} weights are GGUF {name}, dequantized first: a 16-bit source gives less error")
        if unscaled:
            notes.append(f"{len(unscaled)} layers are FP8 without a scale: what that cast lost cannot be restored")
        elif fp8:
            notes.append(f"{len(fp8)} layers are scaled FP8, dequantized first: a 16-bit source gives less error")
        if self.architecture.name == "generic":
            notes.append(self._guessed())
        if self.banks:
            known = "no diffusion model of ComfyUI reads scales for 3-D weights"
            reason = known if self.architecture.part == "model" else "3-D weights are not quantized here"
            notes.append(
                f"{len(self.banks)} banks of experts (such as {self.banks[0]}) stay in the source dtype: {reason}"
            )
        return notes

    def about_parts(self) -> list[str]:
        """What becomes of the parts that are not quantized."""
        notes = []
        for part in self.parts:
            if not part.architecture:
                how = "stored as float16 instead of float32" if part.prefix in self.halved else "stays as it is"
                notes.append(f"{part.title} ({part.prefix}*) {how}: ComfyUI reads no scales for it in a checkpoint")
        wide = [part for part in self.contents if part not in self.parts and self._is_float32(part)]
        if wide:
            prefixes = tuple(part.prefix for part in wide)
            nbytes = sum(e.nbytes for k, e in self.checkpoint.entries.items() if k.startswith(prefixes))
            words = ",".join(dict.fromkeys(part.kind for part in [*self.parts, *wide]))
            notes.append(f"{gigabytes(nbytes)} of other parts stay float32: parts {words} would make them smaller")
        return notes

    def _guessed(self) -> str:
        """What the generic row made of this file's names, in one line."""
        blocks = {(info.subgraph, info.block) for info in self.layers.values() if info.block is not None}
        counts = Counter(subgraph for subgraph, _ in blocks)
        kept = Counter(info.protected.partition(":")[0] for info in self.layers.values() if info.protected)
        reasons = ", ".join(f"{count} as {reason}" for reason, count in kept.most_common())
        found = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        return (
            f"unknown family: blocks guessed from names are {found}; "
            f"kept by rule: {reasons or 'nothing'}; which layers share an input is not known"
        )

    def _weights(self) -> list[tuple[str, TensorEntry]]:
        return [(key, entry) for key, entry in self.checkpoint.entries.items() if self._is_weight(key, entry)]

    def _is_weight(self, key: str, entry: TensorEntry) -> bool:
        return self.inside(key) and key.endswith(".weight") and entry.dtype in FLOATS

    def _prefix_of(self, key: str) -> str:
        return next((part.prefix for part in self.contents if key.startswith(part.prefix)), "")

    def inside(self, key: str) -> bool:
        """Whether this is a key of a chosen part whose layers can be quantized."""
        return key.startswith(tuple(part.prefix for part in self._scaled))

    def _is_float32(self, part: Part) -> bool:
        """Whether what counts in this part is float32, and not only a norm here and there."""
        inside = (e for k, e in self.checkpoint.entries.items() if k.startswith(part.prefix))
        dtypes = {e.dtype for e in inside if len(e.shape) > 1}
        return "F32" in dtypes and not dtypes & {"F16", "BF16", *FP8}

    def _chosen(self, kinds: Collection[str]) -> list[Part]:
        here = dict.fromkeys(part.kind for part in self.contents)
        if lost := [kind for kind in kinds if kind not in here]:
            raise CalibQuantError(
                f"{self.path}: has no part {lost[0]} ({KINDS.get(lost[0], 'unknown')}): choose of {', '.join(here)}"
            )
        return [part for part in self.contents if part.kind in kinds]

    def _refuse_unscaled(self) -> None:
        """Of the chosen parts nothing can be made smaller."""
        if self.parts and not self._scaled:
            names = ", ".join(part.title for part in self.parts)
            raise CalibQuantError(
                f"{self.path}: nothing to do: of {names} ComfyUI reads no scales in a checkpoint, and it is 16 bit "
                "already: choose part model, too"
            )

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
        suffixes = [self.dialect.scale, ".comfy_quant", *(d.input_scale for d in DIALECTS if d.input_scale)]
        prefixes = ["", *(part.prefix for part in self._scaled)]
        markers = {prefix + self.dialect.marker for prefix in prefixes} if self.dialect.marker else set()
        return frozenset(
            key
            for key in self.checkpoint.entries
            if key in markers or any(key.endswith(s) and self._has_weight(key, s) for s in suffixes)
        )

    def _refuse_unknown_scales(self) -> None:
        """An FP8 weight whose scale went unseen would be wrong without a word."""
        for key in self.checkpoint.entries:
            layer, _, suffix = key.replace(".weight.", ".", 1).rpartition(".")
            if "scale" not in suffix or key in self.consumed:
                continue
            weight = self.checkpoint.entries.get(f"{layer}.weight") if self.inside(key) else None
            if weight is not None and weight.dtype in FP8:
                raise CalibQuantError(
                    f"{self.path}: layer {layer} is FP8 beside {key}, a scale that is not known here: "
                    "quantize from the 16-bit original"
                )

    def _has_weight(self, key: str, suffix: str) -> bool:
        return self.inside(key) and key.removesuffix(suffix) + ".weight" in self.checkpoint.entries

    def _refuse_unread(self) -> None:
        """Of some files the loader reads no scale at all."""
        row = self.architecture
        if row.unread and all(info.not_linear for info in self.layers.values()):
            raise CalibQuantError(f"{self.path}: {row.title}: {row.unread[0][1]}: leave it as it is")

    def _refuse_quantized(self) -> None:
        for part in self._scaled:
            for layer, fmt in declared_formats(self.checkpoint, part.prefix).items():
                here = part.prefix == self.prefix or layer + ".weight" in self.checkpoint.entries
                if here and not fmt.startswith("float8_"):
                    raise CalibQuantError(_already(self.path, layer, fmt))
        for key, entry in self.checkpoint.entries.items():
            if self.inside(key) and key.endswith(".weight") and entry.dtype not in FLOATS:
                raise CalibQuantError(_already(self.path, key.removesuffix(".weight"), entry.dtype))
            if self.inside(key) and entry.dtype == "F8_E8M0":
                raise CalibQuantError(_already(self.path, key.rpartition(".")[0], "mxfp8"))


def scale_step(path: Path, layer: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight that share one scale: all, one row, or a block. By shape alone, and never a guess.

    Raises CalibQuantError when the scales do not fit the weight.
    """
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    if math.prod(scales) == 1:
        return max(rows, 1), max(columns, 1)
    if scales in ((rows,), (rows, *[1] * (len(shape) - 1))):
        return 1, max(columns, 1)
    if len(shape) == 2 and scales == (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)):
        return SCALE_BLOCK, SCALE_BLOCK
    raise CalibQuantError(
        f"{path}: layer {layer} has a scale of shape {scales}, neither per tensor nor per row nor per block of "
        f"{SCALE_BLOCK} × {SCALE_BLOCK}: quantize from the 16-bit original"
    )


def _already(path: Path, layer: str, fmt: str) -> str:
    return f"{path}: layer {layer} is quantized already ({fmt}): quantize from the 16-bit original"


def _refuse_lora(path: Path, keys: dict[str, TensorEntry]) -> None:
    if any(".lora_up." in k or ".lora_A." in k or ".lora_B." in k for k in keys):
        raise CalibQuantError(f"{path}: is a LoRA, not a model: give the diffusion model itself")


def _refuse_llama(path: Path, keys: dict[str, TensorEntry]) -> None:
    if found := next((k for k in keys if k.startswith(("blk.", "enc.blk.", "v.blk."))), None):
        raise CalibQuantError(
            f"{path}: is a language model in llama.cpp's names (it has {found}), not a diffusion model: give the "
            "diffusion model, or the text encoder's .safetensors release"
        )


def _refuse_lossy(path: Path, keys: dict[str, TensorEntry]) -> None:
    if found := next((e for e in keys.values() if e.blocks and e.blocks.lossy), None):
        raise CalibQuantError(
            f"{path}: tensor {found.name} is GGUF {found.stored}, which has lost too much to be quantized again: take "
            "the 16-bit or Q8_0 file, or insist with --allow-lossy on the command line"
        )
