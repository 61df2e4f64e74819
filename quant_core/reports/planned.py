"""What is expected of a plan made for a budget: a few lines, and its size-error curve as a picture (SVG)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

from ..files.text import gigabytes
from ..models.source import Source
from ..planning.plan import Plan
from ..planning.targets import words

WIDTH, HEIGHT, MARGIN = 720, 420, 70  # of the picture, pixels
MEANING = {
    "gradient": "relative squared change of the model's prediction",
    "hswq": "mean {of}, weighted by output variance",
    "score": "mean {of}, weighted by quant_probe's score",
    "uniform": "mean {of}",
}
GUESSED = "guessed: without a calibration only the rounding of weights is known, not that of inputs"


def lines(plan: Plan, source: Source | None = None) -> list[str]:
    """Error and size as predicted, what else the bytes could buy, the curve; what to expect of the file."""
    parts = source.about_parts() if source else []
    return [*(_predicted(plan, plan.predicted) if plan.predicted else []), *parts, *words(plan, source)]


def _predicted(plan: Plan, found: dict[str, Any]) -> list[str]:
    of = "relative output error as loaded" if found["measured"] else "relative weight error"
    head = f"predicted error {found['error']:.2e} ({MEANING[found['weighting']].format(of=of)})"
    table = [f"  {gigabytes(p['size']):>10}  {p['error']:.2e}" for p in found["curve"]]
    return [
        head + f" at {found['bits']:.2f} bits a weight, within {100 * found['gap']:.2g} % of the best possible",
        *([] if found["measured"] else [GUESSED]),
        *([f"measured error of the final latent: {found['sampled']:.2e}"] if "sampled" in found else []),
        *(f"control: {p['name']}, {gigabytes(p['size'], plan.size)}: {_known(p)}" for p in found["controls"]),
        "size and least error:",
        *table,
    ]


def _known(point: dict[str, Any]) -> str:
    measured = f", measured {point['measured']:.2e}" if "measured" in point else ""
    return f"{point['error']:.2e}{measured}"


def svg(plan: Plan) -> str:
    """The curve with the plan and all one-format plans and recipes as points; errors of 0 have no place on it."""
    found = plan.predicted or {"curve": [], "points": [], "error": 0.0}
    here = {"name": "this plan", "size": found.get("size", plan.size), "error": found["error"]}
    points = [p for p in [*found["points"], here] if p["error"] > 0]
    curve = [p for p in found["curve"] if p["error"] > 0]
    x = _axis([p["size"] for p in points + curve], MARGIN, WIDTH - MARGIN)
    y = _axis([math.log10(p["error"]) for p in points + curve], HEIGHT - MARGIN, MARGIN)
    track = " ".join(f"{x(p['size']):.1f},{y(math.log10(p['error'])):.1f}" for p in curve)
    marks = [_mark(x(p["size"]), y(math.log10(p["error"])), p["name"], p is here) for p in points]
    ends = [(p["size"], p["error"]) for p in (curve[:1] + curve[-1:])]
    labels = [_text(x(size), HEIGHT - MARGIN / 2, gigabytes(size), "middle") for size, _ in ends]
    labels += [_text(MARGIN - 8, y(math.log10(error)), f"{error:.1e}", "end") for _, error in ends]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            _text(WIDTH / 2, 24, f"{plan.source}: predicted error (logarithmic) by file size", "middle"),
            f'<polyline points="{track}" fill="none" stroke="black"/>',
            *marks,
            *labels,
            "</svg>\n",
        ]
    )


def _axis(values: list[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _mark(x: float, y: float, name: str, filled: bool) -> str:
    fill = "crimson" if filled else "white"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="crimson"/>' + _text(x + 7, y - 5, name)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
