"""The weights of a model file: read one at a time, dequantized where the file is scaled FP8 or GGUF."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ..files.checkpoint import DTYPES, Checkpoint
from .modelfile import ModelFile, scale_step


class Source(ModelFile):
    """A model file whose weights can be read."""

    reader = Checkpoint
    checkpoint: Checkpoint

    def load(self, layer: str) -> torch.Tensor:
        """The real weight ``[out, in]`` in the dtype on disk, or in float32 where it is dequantized.

        Raises CalibQuantError when the scale does not fit the weight.
        """
        weight = self.checkpoint.read(layer + ".weight")
        key = self.scale_key(layer)
        if key is None:
            return weight
        return apply_scale(self.path, layer, weight, self.checkpoint.read(key))

    def kept_dtype(self, layer: str) -> torch.dtype:
        """The dtype in which the weight is written when a plan leaves it alone."""
        is_scaled = self.is_scaled(layer + ".weight")
        return self.model_dtype(layer) if is_scaled else self.copied_dtype(layer + ".weight")

    def copied_dtype(self, key: str) -> torch.dtype:
        """The dtype in which a tensor is written that is not quantized."""
        return torch.float16 if self.halves(key) else DTYPES[self.checkpoint.entries[key].dtype]

    def model_dtype(self, layer: str) -> torch.dtype:
        """The 16-bit dtype that most tensors of the layer's part have; bfloat16 when none has one."""
        prefix = self._prefix_of(layer)
        wide = Counter(
            e.dtype
            for k, e in self.checkpoint.entries.items()
            if k.startswith(prefix) and e.dtype in ("BF16", "F16") and k.endswith((".weight", ".bias"))
        )
        return DTYPES[wide.most_common(1)[0][0]] if wide else torch.bfloat16


def apply_scale(path: Path, layer: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 weight * scale for a scale per tensor, per output row or per block."""
    rows, columns = scale_step(path, layer, tuple(weight.shape), tuple(scale.shape))
    if not weight.dim():
        return weight.float() * scale.float().reshape(())
    flat = weight.float().reshape(weight.shape[0], -1)
    scale = scale.float().reshape(-(-flat.shape[0] // rows), -1).repeat_interleave(rows, 0)[: flat.shape[0]]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(columns, 1)[:, : flat.shape[1]]
    return (flat * scale).view(weight.shape)
