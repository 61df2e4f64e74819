"""A picture of pictures: for each sample both models' and their difference, with captions. Needs Pillow."""

from __future__ import annotations

import contextlib
import io
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
ROWS = 8  # at most
GAIN = 8  # of the difference
LARGEST, SMALLEST = 512, 256  # pixels of a picture's longer side on the sheet, where that is possible
EDGE, GAP = 24, 8
PAPER, INK, QUIET = (24, 24, 27), (240, 240, 240), (160, 160, 168)
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")  # with more letters than Pillow's own has


@dataclass(frozen=True)
class Row:
    """tiles: the original, the other, their difference. captions: the first in full ink."""

    tiles: tuple[Image.Image, Image.Image, Image.Image]
    captions: tuple[str, ...]


def chosen(errors: list[float]) -> list[int]:
    """Which samples are shown: all, or the ROWS with the largest errors; in the order of drawing."""
    worst = sorted(range(len(errors)), key=lambda i: -errors[i])[:ROWS]
    return sorted(worst)


def tiles(wanted: torch.Tensor, found: torch.Tensor) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Of pictures [frames, H, W, C] in 0..1: both, and |A - B| times GAIN. Of a video the frames ``shown``."""
    some = shown(len(wanted))
    a, b = (pictures[some, ..., :3].float().cpu().clamp(0, 1) for pictures in (wanted, found))
    first, second, third = (_column(frames) for frames in (a, b, ((a - b).abs() * GAIN).clamp(max=1)))
    return first, second, third


def shown(frames: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, frames // 2, frames - 1})


def _column(frames: torch.Tensor) -> Image.Image:
    from PIL import Image

    parts = [_tile(frame) for frame in frames]
    width, height = parts[0].size
    column = Image.new("RGB", (width, len(parts) * (height + GAP) - GAP), PAPER)
    for i, part in enumerate(parts):
        column.paste(part, (0, i * (height + GAP)))
    return column


def _tile(picture: torch.Tensor) -> Image.Image:
    """Small pictures grow by whole numbers, so that their pixels stay what they are."""
    from PIL import Image

    image = Image.fromarray((255 * picture.expand(*picture.shape[:2], 3)).round().byte().numpy())
    longest = max(image.size)
    if longest > LARGEST:
        size = [max(1, round(n * LARGEST / longest)) for n in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = max(1, SMALLEST // longest)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def draw(rows: list[Row], heading: str, columns: tuple[str, str, str], footing: str) -> Image.Image:
    """The sheet. Rows share one size of tiles."""
    from PIL import Image, ImageDraw

    width, height = rows[0].tiles[0].size
    inner = 3 * width + 2 * GAP
    big, normal, small = (Font(size) for size in (22, 17, 14))
    head, foot = big.wrapped(heading, inner), small.wrapped(footing, inner)
    tall = sum(height + 24 * len(row.captions) + 24 for row in rows)
    size = inner + 2 * EDGE, 2 * EDGE + 30 * len(head) + 40 + tall + 20 * len(foot)
    sheet = Image.new("RGB", size, PAPER)
    pen, y = ImageDraw.Draw(sheet), EDGE
    for line in head:
        y = big.write(pen, EDGE, y, line, INK, 30)
    for i, title in enumerate(columns):
        normal.write(pen, EDGE + i * (width + GAP), y + 10, normal.cut(title, width - EDGE), QUIET)
    y += 40
    for row in rows:
        for i, tile in enumerate(row.tiles):
            sheet.paste(tile, (EDGE + i * (width + GAP), y))
        y = normal.write(pen, EDGE, y + height + 8, normal.cut(row.captions[0], inner), INK, 24)
        for line in row.captions[1:]:
            y = small.write(pen, EDGE, y, small.cut(line, inner), QUIET, 24)
        y += 16
    for line in foot:
        y = small.write(pen, EDGE, y, line, QUIET, 20)
    return sheet


def png(sheet: Image.Image) -> bytes:
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


class Font:
    """A typeface in one size, and text made to fit."""

    def __init__(self, size: int) -> None:
        from PIL import ImageFont

        self._poor = True
        for name in FONTS:
            with contextlib.suppress(OSError):  # not on this machine
                self._font, self._poor = ImageFont.truetype(name, size), False
                return
        self._font = ImageFont.load_default(size)

    def write(self, pen: ImageDraw.ImageDraw, x: int, y: int, text: str, ink: Colour, height: int = 0) -> int:
        """Where the next line begins."""
        pen.text((x, y), self._known(text), font=self._font, fill=ink)
        return y + height

    def wrapped(self, text: str, width: int) -> list[str]:
        letters = max(20, int(width / max(1.0, self._font.getlength("n"))))
        return textwrap.wrap(text, letters)

    def cut(self, text: str, width: int) -> str:
        """One line, shortened where it is too long."""
        text = " ".join(text.split())
        while self._font.getlength(self._known(text)) > width and len(text) > 2:
            text = text[: -max(2, len(text) // 20)].rstrip(" …") + "…"
        return text

    def _known(self, text: str) -> str:
        """What can be drawn: Pillow's own typeface has plain letters only."""
        if not self._poor:
            return text
        plain = text.translate(str.maketrans({"×": "x", "−": "-", "–": "-", "·": "-", "…": "."}))
        return plain.encode("ascii", "replace").decode()
