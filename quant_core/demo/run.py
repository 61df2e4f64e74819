"""``calibquant demo``: the whole job on the small trained model that ships with the pack.

Quantizes it by every recipe, once more to NVFP4 with the calibration that ships beside it, verifies each file, and,
with a ComfyUI at hand, lets ComfyUI load each file and draw the ten digits: how many a classifier still reads, and how
close the pictures are to the 16-bit model's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from .. import jobs
from ..errors import CalibQuantError
from ..evidence import calibration
from ..formats import title
from ..locate import asset, find_comfyui
from ..models.source import Source
from ..planning import recipes, targets
from . import digits

if TYPE_CHECKING:
    from PIL import Image

    from ..evidence.calibration import Calibration

MODEL = "workflows/models/calibquant_digits_wan.safetensors"
CALIBRATION = "workflows/calibrations/digits.calibration.safetensors"  # of other seeds than the demo draws


@dataclass(frozen=True)
class Row:
    """One line of the table. read: share of digits read correctly; ssim: mean over digits and seeds."""

    name: str
    path: Path
    nbytes: int
    layers: str = ""
    error: float = 0.0
    read: float | None = None
    ssim: float | None = None
    needs: tuple[targets.Target, ...] = ()

    def loads_in(self, comfyui: Path) -> bool:
        return not any(target.missing(comfyui) for target in self.needs)


def run(out: str | os.PathLike[str], seeds: int = 2) -> str:
    """Do it all and return the table as text. Files land in ``out``, which is made; older demo files are replaced."""
    out, model = Path(out), asset(MODEL)
    if not model.exists():
        raise CalibQuantError(f"{model}: the demo model is missing: reinstall the pack")
    try:
        out.mkdir(parents=True, exist_ok=True)
        comfyui = find_comfyui()
    except OSError as e:
        raise CalibQuantError(f"{out}: {e}") from e
    rows = [Row("16-bit source", model, model.stat().st_size), *_quantize_all(model, out)]
    notes = [f"files and pictures: {out.resolve()}"]
    if comfyui is None:
        notes.append("no ComfyUI found (set COMFYUI_PATH): files were verified, but nothing was sampled")
    else:
        loaded = [row for row in rows if row.loads_in(comfyui)]
        images = _sample(comfyui, [row.path for row in loaded], out / "latents.npz", seeds)
        judged = {row.name: _judge(row, drawn, images[0]) for row, drawn in zip(loaded, images, strict=True)}
        rows = [judged.get(row.name, row) for row in rows]
        notes.append(f"sampled by ComfyUI at {comfyui}: 10 digits x {seeds} seeds, 12 steps; n = {10 * seeds}")
        if newer := [row.name for row in rows if row.name not in judged]:
            notes.append(f"not sampled, because this ComfyUI is too old to load them: {', '.join(newer)}")
        notes += _pictures(loaded, images, out / "samples.png")
    return "\n".join([_table(rows), *notes])


def _quantize_all(model: Path, out: Path) -> list[Row]:
    with Source(model) as source:
        fitting = [
            r
            for r in recipes.RECIPES.values()
            if source.architecture.name in (r.architectures or source.architecture.name)
        ]
        jobs: list[tuple[recipes.Recipe, Calibration | None]] = [(recipe, None) for recipe in fitting]
        seen = calibration.load(asset(CALIBRATION))
        for name in ("nvfp4", "w4a8"):
            jobs.insert(1 + [recipe.name for recipe, _ in jobs].index(name), (recipes.RECIPES[name], seen))
        bar = tqdm(jobs, desc="quantize and verify", file=sys.stderr, leave=False, disable=None)
        return [_quantize(source, recipe, seen, out) for recipe, seen in bar]


def _quantize(source: Source, recipe: recipes.Recipe, seen: Calibration | None, out: Path) -> Row:
    plan = recipes.make_plan(source, recipe)
    rounding = "nearest" if seen is None else "gptq"
    name = recipe.name if seen is None else f"{recipe.name}-{rounding}"
    path = out / f"digits-{name}.safetensors"
    report = jobs.quantize(source, plan, path, overwrite=True, calibration=seen, rounding=rounding, verify=True)
    layers = ", ".join(f"{n} {title(fmt)}" for fmt, n in report.count().items())
    return Row(name, path, report.bytes_after, layers, report.mean_error(), needs=tuple(targets.needs(plan)))


def _sample(comfyui: Path, files: list[Path], npz: Path, seeds: int) -> list[torch.Tensor]:
    """Pictures float32 [seeds * 10, 32, 32] per file, drawn by ComfyUI in a process of its own."""
    script = asset("nodes/sample_digits.py")
    command = [sys.executable, script, "--comfyui", comfyui, "--out", npz, "--seeds", str(seeds), *files]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CalibQuantError(f"{comfyui}: ComfyUI could not sample the demo model ({last[0]}): check its installation")
    with np.load(npz) as latents:
        return [digits.latent_to_image(latents[str(i)]) for i in range(len(files))]


def _judge(row: Row, images: torch.Tensor, reference: torch.Tensor) -> Row:
    wanted = torch.arange(10).repeat(len(images) // 10)
    read = (digits.read_digits(images) == wanted).float().mean().item()
    return replace(row, read=read, ssim=ssim(images, reference))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Mean structural similarity (scikit-image, Gaussian window, data range 1); None without scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    pairs = zip(images.numpy(), reference.numpy(), strict=True)
    scores = [structural_similarity(a, b, data_range=1.0, gaussian_weights=True) for a, b in pairs]
    return float(np.mean(scores))


def _pictures(rows: list[Row], images: list[torch.Tensor], path: Path) -> list[str]:
    """A sheet with a row per file: the ten digits of the first seed."""
    try:
        from PIL import Image
    except ImportError:
        return ["no pictures and no SSIM without the extra: pip install calibquant[metrics]"]
    sheet: Image.Image = Image.fromarray((255 * torch.cat([_strip(drawn) for drawn in images])).byte().numpy())
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)
    return [f"{path.name}: one row per line of the table, top to bottom: {', '.join(row.name for row in rows)}"]


def _strip(images: torch.Tensor) -> torch.Tensor:
    """float32 [32 + 4, 320]: the first ten pictures side by side over a dark line."""
    return torch.nn.functional.pad(torch.cat(list(images[:10]), dim=1), (0, 0, 0, 4))


def _table(rows: list[Row]) -> str:
    header = f"{'':<14} {'bytes':>10} {'weight error':>13} {'digits read':>12} {'SSIM':>7}  layers"
    lines = [header, "-" * len(header)]
    for row in rows:
        error = f"{row.error:.2e}" if row.layers else "-"
        read = "-" if row.read is None else f"{100 * row.read:.1f} %"
        ssim = "-" if row.ssim is None else f"{row.ssim:.4f}"
        lines.append(f"{row.name:<14} {row.nbytes:>10} {error:>13} {read:>12} {ssim:>7}  {row.layers}")
    return "\n".join(lines)
