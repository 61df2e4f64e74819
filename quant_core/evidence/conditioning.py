"""How far apart two text encoders are in what they make of a prompt, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .likeness import relative_error


@dataclass(frozen=True)
class Closeness:
    """Of one prompt's conditioning. error: ||A - B||^2 / ||A||^2 of all tokens; mean, median and worst: of a token."""

    tokens: int
    error: float
    mean: float
    median: float
    worst: float
    cosine: float  # of a token, mean
    least_cosine: float


def compare(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> Closeness:
    """Of conditionings [..., tokens, width]. mask: 1 for tokens of the prompt, [..., tokens] or flat; None for all.

    Tokens that are zero in ``wanted`` do not count: an encoder writes zeros where nothing is to be read.
    """
    a, b = (each.double().reshape(-1, each.shape[-1]) for each in (wanted, found))
    counts = a.square().sum(1) > 0
    if mask is not None and mask.numel() == len(a):
        counts &= mask.reshape(-1).bool()
    a, b = a[counts], b[counts]
    errors, cosines = (b - a).square().sum(1) / a.square().sum(1), torch.cosine_similarity(a, b, dim=1)
    return Closeness(
        len(a),
        relative_error(b, a),
        errors.mean().item(),
        errors.median().item(),
        errors.max().item(),
        cosines.mean().item(),
        cosines.min().item(),
    )


def distance(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """The mean error of a token between two prompts, of the places that both have; mask: of ``wanted``."""
    count = min(found.shape[-2], wanted.shape[-2])
    mask = mask[..., :count] if mask is not None and mask.numel() == wanted[..., 0].numel() else None
    return compare(found[..., :count, :], wanted[..., :count, :], mask).mean
