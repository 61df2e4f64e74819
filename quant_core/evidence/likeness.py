"""How alike two samples are, latents and pictures, and how far a mean over few of them may be off."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

SIGMA, WINDOW = 1.5, 11  # of SSIM's Gaussian, as published; its window in pixels
MOST_DB = 100.0  # PSNR of identical pictures, so that it stays a number: a mean squared error of 1e-10 or less
LEVEL, RESAMPLES = 0.95, 10_000  # of the bootstrap
LPIPS_NET = "alex"  # the headline network of published comparisons
Distance = Callable[[torch.Tensor, torch.Tensor], float]


def relative_error(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """||found - wanted||^2 / ||scale||^2, where scale is ``wanted`` unless given; summed in float64."""
    apart, size = (found.double() - wanted.double()), (wanted if scale is None else scale).double()
    return (apart.square().sum() / size.square().sum().clamp(min=torch.finfo(torch.float64).tiny)).item()


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, at most MOST_DB."""
    mse = (found.double() - wanted.double()).square().mean().item()
    return min(MOST_DB, -10 * float(np.log10(max(mse, 1e-30))))


def ssim(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Structural similarity of pictures [frames, H, W, C] in 0..1, mean over frames.

    scikit-image with Gaussian weights, sigma 1.5, data range 1.0. Ask :func:`why_no_ssim` first.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(found.float().cpu().numpy(), wanted.float().cpu().numpy(), strict=True)
    how = {"channel_axis": -1, "gaussian_weights": True, "sigma": SIGMA, "data_range": 1.0}
    return fmean(float(structural_similarity(a, b, **how)) for a, b in pairs)


def why_no_ssim(height: int, width: int) -> str:
    """In words; empty where it can be measured."""
    if importlib.util.find_spec("skimage") is None:
        return "scikit-image is not installed"
    return f"pictures are smaller than its window of {WINDOW} pixels" if min(height, width) < WINDOW else ""


def lpips() -> tuple[Distance | None, str]:
    """LPIPS of pictures [frames, H, W, C] in 0..1, mean over frames; or None and why not. Never downloads."""
    if importlib.util.find_spec("lpips") is None:
        return None, "the package lpips is not installed"
    from torchvision.models import AlexNet_Weights

    weights = Path(torch.hub.get_dir(), "checkpoints", AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    if not weights.is_file():
        return None, f"its weights ({weights.name}) are not in PyTorch's cache, and nothing is downloaded for it"
    import lpips as package

    model = package.LPIPS(net=LPIPS_NET, verbose=False)  # torch.hub takes the file that is there

    def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
        a, b = (2 * pictures[..., :3].float().cpu().movedim(-1, 1) - 1 for pictures in (found, wanted))
        with torch.no_grad():
            return fmean(model(a[i : i + 1], b[i : i + 1]).item() for i in range(len(a)))

    return distance, ""


@dataclass(frozen=True)
class Summary:
    """Of one measure over n pictures. interval: of the mean, LEVEL of a bootstrap over pictures; None for one."""

    mean: float
    worst: float
    n: int
    interval: tuple[float, float] | None


def summarize(values: Sequence[float], larger_is_worse: bool = True) -> Summary | None:
    """None for no values."""
    if not values:
        return None
    worst = max(values) if larger_is_worse else min(values)
    return Summary(fmean(values), worst, len(values), interval(values))


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean. A single value says nothing of the next: None."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[draws].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
