"""Pictures and a judge for the digits demo model. Needs torch and safetensors only, nothing of ComfyUI.

A demo latent is the 32x32 grey picture folded four by four into 16 channels, brought to about unit
variance ("model space") and then moved by ComfyUI into the latent space of Wan 2.1, per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from ..locate import asset

IMAGE_MEAN, IMAGE_STD = 0.31, 0.36  # of the training pictures, pixels in 0..1
FOLD = 4  # one latent cell holds FOLD x FOLD pixels
LATENT_SHAPE = (FOLD * FOLD, 1, 8, 8)  # channels, frames, height, width

# Per-channel statistics of the Wan 2.1 latent space, as published with the model.
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

JUDGE_PATH = asset("workflows/judge/digits_judge.safetensors")


@dataclass(frozen=True)
class Judge:
    """A two-layer classifier of 8x8 digits (0 = paper, 1 = ink) and its accuracy on digits it never saw."""

    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    held_out_accuracy: float

    def logits(self, small: torch.Tensor) -> torch.Tensor:
        """Scores float32 [N, 10] of pictures float32 [N, 8, 8]."""
        hidden = functional.relu(functional.linear(small.flatten(1), self.hidden_weight, self.hidden_bias))
        return functional.linear(hidden, self.out_weight, self.out_bias)


def image_to_latent(images: torch.Tensor) -> torch.Tensor:
    """Pictures float [N, 32, 32] in 0..1 to model-space latents float32 [N, 16, 1, 8, 8]."""
    scaled = (images.float() - IMAGE_MEAN) / IMAGE_STD
    return functional.pixel_unshuffle(scaled[:, None], FOLD)[:, :, None]


def to_wan_space(latent: torch.Tensor) -> torch.Tensor:
    """Model-space latents [N, 16, 1, 8, 8] to the space in which KSampler hands them out."""
    mean, std = _wan_statistics(latent)
    return latent * std + mean


def from_wan_space(latent: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_wan_space`, for any leading dimensions: float32 [N, 16, 1, 8, 8]."""
    latent = latent.reshape(-1, *LATENT_SHAPE)
    mean, std = _wan_statistics(latent)
    return (latent - mean) / std


def latent_to_image(latent: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Draw demo latents as KSampler returns them.

    latent: any float dtype, [..., 16, 1, 8, 8], in Wan 2.1's latent space. Returns float32 [N, 32, 32] on the
    CPU, 0..1, where N counts all leading dimensions. Raises ValueError for any other shape.
    """
    latent = torch.as_tensor(latent).detach().to("cpu", torch.float32)
    if latent.ndim < 4 or tuple(latent.shape[-4:]) != LATENT_SHAPE:
        raise ValueError(f"a digits latent is [..., {', '.join(map(str, LATENT_SHAPE))}], not {list(latent.shape)}")
    folded = from_wan_space(latent)[:, :, 0]
    return (functional.pixel_shuffle(folded, FOLD)[:, 0] * IMAGE_STD + IMAGE_MEAN).clamp(0, 1)


def shrink(images: torch.Tensor) -> torch.Tensor:
    """Average pictures float [N, 32, 32] back to the 8x8 the judge reads."""
    return functional.avg_pool2d(images[:, None].float(), FOLD)[:, 0]


def load_judge(path: str | Path = JUDGE_PATH) -> Judge:
    """Load the classifier written by benchmarks/train_demo.py. Raises ValueError naming a file that is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
            accuracy = float((file.metadata() or {})["held_out_accuracy"])
        return Judge(
            tensors["hidden.weight"], tensors["hidden.bias"], tensors["out.weight"], tensors["out.bias"], accuracy
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a digits judge ({error}); write it with benchmarks/train_demo.py") from error


def read_digits(images: torch.Tensor, judge: Judge | None = None) -> torch.Tensor:
    """Read pictures float [N, 32, 32] in 0..1: int64 [N] of 0..9. Without a judge, the one shipped with the pack."""
    judge = judge or _shipped_judge()
    return judge.logits(shrink(images)).argmax(1)


@lru_cache(maxsize=1)
def _shipped_judge() -> Judge:
    return load_judge(JUDGE_PATH)


def _wan_statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, len(WAN21_MEAN), 1, 1, 1)
    return like.new_tensor(WAN21_MEAN).view(shape), like.new_tensor(WAN21_STD).view(shape)
