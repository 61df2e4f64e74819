"""How far apart two text encoders are in what they make of a prompt, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .likeness import relative_error


@dataclass(frozen=True)
class Closeness:
    """Of one prompt's conditioning. error: ||A - B||^2 / ||A||^2 over all tokens; mean, median and worst: of a token."""

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
    a, b = tokens_of(wanted, wanted, mask), tokens_of(found, wanted, mask)
    errors, cosines = token_errors(b, a), torch.cosine_similarity(a, b, dim=1)
    return Closeness(
        len(a),
        relative_error(b, a),
        errors.mean().item(),
        errors.median().item(),
        errors.max().item(),
        cosines.mean().item(),
        cosines.min().item(),
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean error of a token between different prompts [..., tokens, width], of the tokens that both have."""
    count = min(one.shape[-2], other.shape[-2])
    one, other = one[..., :count, :], other[..., :count, :]
    return token_errors(tokens_of(other, one, None), tokens_of(one, one, None)).mean().item()


def token_errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """||a - b||^2 / ||a||^2 of each row of float64 [tokens, width]."""
    return (found - wanted).square().sum(1) / wanted.square().sum(1)


def tokens_of(cond: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The tokens of a conditioning that count, float64 [tokens, width]."""
    rows, reference = (each.double().reshape(-1, each.shape[-1]) for each in (cond, wanted))
    counts = reference.square().sum(1) > 0
    if mask is not None and mask.numel() == len(rows):
        counts &= mask.reshape(-1).bool()
    return rows[counts]
