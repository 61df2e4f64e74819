"""Several LoRAs in one file: their ranks side by side, strength, alpha and rank folded in.

For the stock bypass loader, which takes one file only: a second replaces the first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from .. import __version__
from ..errors import CalibQuantError, OptionError
from ..files.checkpoint import DTYPES, Checkpoint, TensorSpec, Writer
from ..files.markers import PROVENANCE_KEY
from ..models import lora, lora_dialects
from ..models.lora_dialects import Part
from ..progress import Progress
from .quantization import refuse_itself


@dataclass(frozen=True)
class _Piece:
    """What one file adds to a layer. rows: first row of the layer's that it belongs to, and how many it has in all."""

    file: Checkpoint
    part: Part
    strength: float
    rows: tuple[int, int]

    @property
    def scale(self) -> float:
        """Strength and, where the file has an alpha, alpha / rank."""
        if not self.part.alpha:
            return self.strength
        return self.strength * self.file.read(self.part.alpha).float().item() / self.rank

    @property
    def rank(self) -> int:
        return self.file.entry(self.part.down).shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which nothing is rounded: the file's, but float32 where the scale is more than a change of exponent."""
        stored = [DTYPES[self.file.entry(key).dtype] for key in (self.part.up, self.part.down)]
        exact = abs(math.frexp(self.scale)[0]) == 0.5
        return torch.promote_types(*stored) if exact else torch.float32

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 up [rows, rank, …] with the scale in it, and down [rank, …]."""
        up, down = (self.file.read(key).float() for key in (self.part.up, self.part.down))
        whole = up.new_zeros(self.rows[1], *up.shape[1:])
        whole[self.rows[0] : self.rows[0] + len(up)] = up * self.scale
        return whole, down


def concat_loras(
    loras: Sequence[tuple[str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write LoRA files, each with its strength, as one; the number of layers it has.

    The first one says how ComfyUI names the model's layers (a split's or an error LoRA does). Nothing is rounded.
    Raises CalibQuantError for a file with anything but plain LoRA factors, or for layers that cannot be told.
    """
    for path, strength in loras:
        if not math.isfinite(strength):
            raise OptionError(f"strength {strength} of {path}: must be a number")
    output = Path(output)
    with ExitStack() as stack:
        files = [stack.enter_context(Checkpoint(path)) for path, _ in loras]
        for file in files:
            refuse_itself(file, output)
        layers = _layers(list(zip(files, (strength for _, strength in loras), strict=True)))
        specs = {layer: _specs(layer, pieces) for layer, pieces in layers.items()}
        about = {
            "tool": f"ComfyUI-CalibQuant {__version__}",
            "kind": "LoRAs side by side",
            "of": [[file.path.name, strength] for file, (_, strength) in zip(files, loras, strict=True)],
        }
        metadata = {PROVENANCE_KEY: json.dumps(about, ensure_ascii=False)}
        with Writer(output, [spec for both in specs.values() for spec in both], metadata, overwrite) as writer:
            for i, (layer, pieces) in enumerate(layers.items()):
                if progress:
                    progress(i, len(layers), f"join {layer}")
                ups, downs = zip(*(piece.factors() for piece in pieces), strict=True)
                for spec, factor in zip(specs[layer], (torch.cat(ups, 1), torch.cat(downs)), strict=True):
                    writer.write(spec.name, factor.to(spec.dtype))
    return len(layers)


def _layers(files: Sequence[tuple[Checkpoint, float]]) -> dict[str, list[_Piece]]:
    """Layer -> what all files add to it, in the files' order."""
    first = files[0][0]
    up, down = lora.keys("")[0].removeprefix(lora.PREFIX), lora.keys("")[1].removeprefix(lora.PREFIX)
    known = {key.removeprefix(lora.PREFIX).removesuffix(up): key for key in first.entries if key.endswith(up)}
    strange = next((k for k in first.entries if not (k.startswith(lora.PREFIX) and k.endswith((up, down)))), None)
    if strange or not known:
        raise CalibQuantError(
            f"{first.path}: has {strange or 'no tensor'}: give the split's own LoRA (….split.lora.safetensors) first"
        )
    sizes = {layer: first.entry(key).shape[0] for layer, key in known.items()}
    layers: dict[str, list[_Piece]] = {}
    for file, strength in files:
        found = lora_dialects.parts(file.path, file.entries, known)
        for part in found:
            rows = _rows(file, part, found, sizes.get(part.layer))
            layers.setdefault(part.layer, []).append(_Piece(file, part, strength, rows))
    for layer, pieces in layers.items():
        _check(layer, pieces)
    return layers


def _rows(file: Checkpoint, part: Part, found: Sequence[Part], size: int | None) -> tuple[int, int]:
    """First row of a part, and the rows of the layer. All parts of a joined layer have equal rows, but the last."""
    own = file.entry(part.up).shape[0]
    if part.of == 1:
        return 0, own
    if size is None:
        others = [file.entry(other.up).shape[0] for other in found if other.layer == part.layer]
        if len(others) < part.of:
            raise CalibQuantError(
                f"{file.path}: {part.up} is one part of {part.layer}, of which the first file has nothing, so its "
                f"place cannot be told: {lora_dialects.REMEDY}"
            )
        size = sum(others)
    return (size - own if part.index == part.of - 1 else part.index * own), size


def _check(layer: str, pieces: Sequence[_Piece]) -> None:
    """All factors of a layer fit together."""
    first = pieces[0]
    for piece in pieces:
        up, down = (piece.file.entry(key).shape for key in (piece.part.up, piece.part.down))
        wide, (start, rows) = first.file.entry(first.part.down).shape[1:], piece.rows
        fits = len(up) > 1 and up[1] == down[0] and down[1:] == wide and rows == first.rows[1]
        if not fits or not 0 <= start <= rows - up[0]:
            raise CalibQuantError(
                f"{piece.file.path}: layer {layer}: its factors are {list(up)} and {list(down)}, those of "
                f"{first.file.path.name} act on {list(wide)}: is it for another model?"
            )


def _specs(layer: str, pieces: Sequence[_Piece]) -> list[TensorSpec]:
    text = layer.startswith(lora_dialects.TEXT)
    keys = (layer + lora.UP, layer + lora.DOWN) if text else lora.keys(layer)
    dtype = reduce(torch.promote_types, [piece.dtype for piece in pieces])
    rank, first = sum(piece.rank for piece in pieces), pieces[0]
    up, down = (first.file.entry(key).shape for key in (first.part.up, first.part.down))
    shapes = (first.rows[1], rank, *up[2:]), (rank, *down[1:])
    return [TensorSpec(key, dtype, shape) for key, shape in zip(keys, shapes, strict=True)]
