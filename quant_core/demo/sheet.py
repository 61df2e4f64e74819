"""The picture sheet: a row per file, its name and score on the left, its digits, and what differs from 16-bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from .results import Row, ssim

SIDE = 48  # pixels that a digit takes
GAP = 4
CAPTION = 210
TITLE = 30
SHOWN = 10  # digits of the first seed
LOUDER = 8  # times, differences
PAPER, INK, GREY = (250, 250, 248), (20, 20, 20), (110, 110, 110)


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Write the sheet; False without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return False
    strip = SHOWN * SIDE
    size = CAPTION + 2 * strip + 3 * GAP, TITLE + len(rows) * (SIDE + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)
    for x, title in (
        (CAPTION, "what each file draws"),
        (CAPTION + strip + GAP, f"difference, {LOUDER} times"),
    ):
        pen.text((x, TITLE / 2), title, INK, large, anchor="lm")
    reference = rows[0].images
    for number, row in enumerate(rows):
        y = TITLE + number * (SIDE + GAP)
        pen.text((GAP + 4, y + SIDE / 2 - 9), row.made.name, INK, large, anchor="lm")
        pen.text((GAP + 4, y + SIDE / 2 + 10), _facts(row, reference), GREY, small, anchor="lm")
        for x, pixels in (
            (CAPTION, row.images),
            (CAPTION + strip + GAP, (row.images - reference).abs().mul(LOUDER).clamp(max=1)),
        ):
            sheet.paste(Image.fromarray(_strip(pixels).numpy()), (x, y))
    sheet.save(path)
    return True


def _facts(row: Row, reference: torch.Tensor) -> str:
    score = ssim(row.images, reference) if row.made.layers else None
    return f"{row.made.nbytes / 1e6:.2f} MB" + ("" if score is None else f" · SSIM {score:.4f}")


def _strip(images: torch.Tensor) -> torch.Tensor:
    """uint8 [SIDE, SHOWN * SIDE]: the first pictures side by side."""
    large = functional.interpolate(images[:SHOWN, None], (SIDE, SIDE), mode="nearest-exact")
    return torch.cat(list(large[:, 0]), dim=1).mul(255).round().byte()
