"""Which noise levels a calibration saw: what tells the two experts of a pair (Wan 2.2) apart."""

from __future__ import annotations

from .calibration import Calibration

BINS = 10
WIDTH = 40  # characters of the longest bar


def sigma_range(calibration: Calibration) -> tuple[float, float] | None:
    """The smallest and the largest sigma of all calls; None where none is known."""
    sigmas = [float(sigma) for sigma in calibration.info.get("sigmas", {})]
    return (min(sigmas), max(sigmas)) if sigmas else None


def range_in_words(calibration: Calibration) -> str:
    low, high = sigma_range(calibration) or (0, 0)
    return f"sigma {high:.4g} to {low:.4g}" if high else "sigmas unknown"


def histogram(calibration: Calibration) -> list[str]:
    """A line for each tenth of the way from pure noise to none, and how often the model was called there.

    The way is sigma, or sigma / (1 + sigma) where that exceeds 1: the same bins for all files of one kind of model.
    """
    counts = {float(sigma): count for sigma, count in calibration.info.get("sigmas", {}).items()}
    if not counts:
        return []
    bounded = max(counts) <= 1
    bins = [0] * BINS
    for sigma, count in counts.items():
        way = sigma if bounded else sigma / (1 + sigma)
        bins[min(int(way * BINS + 1e-6), BINS - 1)] += count
    edges = [i / BINS if bounded else i / (BINS - i) for i in range(BINS)] + [1.0 if bounded else float("inf")]
    lines = []
    for i in reversed(range(BINS)):
        bar = "#" * -(-WIDTH * bins[i] // max(bins))
        lines.append(f"sigma {edges[i]:>5.3g} - {edges[i + 1]:<5.3g}{bins[i]:>7} {bar}".rstrip())
    return lines
