"""What one file of the demo came to, and the table and the sentence that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evidence import likeness
from ..planning.targets import Target
from . import digits


@dataclass(frozen=True)
class Made:
    """A file and what is known of it before anything is drawn. error: of its weights, mean over quantized layers."""

    name: str
    path: Path
    nbytes: int
    layers: str = ""
    error: float = 0.0
    needs: tuple[Target, ...] = ()

    def loads_in(self, comfyui: Path) -> bool:
        return not any(target.missing(comfyui) for target in self.needs)


@dataclass(frozen=True)
class Row:
    """A file with what it draws: pictures float32 [seeds * 10, 32, 32]. rounded: with inputs rounded as on RTX 50."""

    made: Made
    images: torch.Tensor
    rounded: torch.Tensor
    mark: str = ""  # "*" where another sampler drew than the table says

    def read(self) -> float:
        """The share of digits that are read as the ones asked for."""
        wanted = torch.arange(10).repeat(len(self.images) // 10)
        return (digits.read_digits(self.images) == wanted).float().mean().item()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Mean structural similarity of pictures [n, H, W] (``likeness``); None where it cannot be measured."""
    if likeness.why_no_ssim(*images.shape[1:]):
        return None
    return likeness.ssim(images[..., None], reference[..., None])


def table(rows: Sequence[Row]) -> str:
    """The first row is what the others are compared with."""
    header = f"{'':<14} {'bytes':>10} {'weight error':>13} {'digits read':>12} {'SSIM':>7} {'on RTX 50':>10}  layers"
    lines = [header, "-" * len(header)]
    for row in rows:
        made = row.made
        error = f"{made.error:.2e}" if made.layers else "-"
        scores = _digits(ssim(row.images, rows[0].images)), _digits(ssim(row.rounded, rows[0].rounded))
        lines.append(
            f"{made.name + row.mark:<14} {made.nbytes:>10} {error:>13} {100 * row.read():>10.1f} % {scores[0]:>7} "
            f"{scores[1]:>10}  {made.layers}"
        )
    return "\n".join(lines)


def other_seed(images: torch.Tensor) -> float | None:
    """SSIM of pictures [seeds * 10, …] with those of the next seed: what a difference that nobody minds looks like."""
    return ssim(images, images.roll(10, 0)) if len(images) > 10 else None


def sentence(rows: Sequence[Row], nearest: str, calibrated: str) -> str:
    """What was shown, of the two named rows and the first."""
    named = {row.made.name: row for row in rows}
    source, plain, best = rows[0], named[nearest], named[calibrated]
    share = best.made.nbytes / source.made.nbytes
    text = (
        f"Shown: the calibrated 4-bit file ({calibrated}) has {100 * share:.0f} % of the 16-bit one's bytes, and "
        f"{100 * best.read():.0f} % of its digits are read as asked (16-bit: {100 * source.read():.0f} %)"
    )
    pairs = (best.images, source.images), (plain.images, source.images), (best.rounded, source.rounded)
    scores = [_digits(ssim(*pair)) for pair in pairs]
    if "-" in scores:
        return text
    return (
        f"{text}, with SSIM {scores[0]} to the 16-bit pictures ({scores[2]} as an RTX 50 runs it), {scores[1]} without "
        "calibration"
    )


def _digits(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"
