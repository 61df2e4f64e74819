"""``calibquant demo``: the whole job on the small trained model that ships with the pack.

Calibrates it by sampling, quantizes it by every recipe, to nearest and where it matters with the calibration too,
verifies each file and lets it draw the ten digits: how many a classifier still reads, and how close the pictures are to
the 16-bit model's. ComfyUI draws where there is one, else the built-in reference sampler, whose latents are the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import jobs
from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..formats import title
from ..locate import asset, find_comfyui
from ..models.source import Source
from ..planning import recipes, targets
from ..progress import Progress
from . import drawing, results, sampler, sheet, wan
from .results import Made, Row

MODEL = "workflows/models/calibquant_digits_wan.safetensors"
SEEDS = range(2000, 2005)  # of the calibration; none of those that are judged
CALIBRATED = ("nvfp4", "w4a8")  # recipes that are tried with the calibration, too
# Rough seconds, for the bar alone.
CALIBRATING, NEAREST, GPTQ, DRAWING, STARTING = 2.0, 1.0, 5.0, 0.6, 8.0


class Bar:
    """One bar over all of the work, which is done in pieces of known shares."""

    def __init__(self, total: float) -> None:
        shape = "{l_bar}{bar}| {elapsed} (about {remaining} left){postfix}"
        self._bar = tqdm(total=total, desc="demo", file=sys.stderr, leave=False, disable=None, bar_format=shape)

    @contextlib.contextmanager
    def piece(self, share: float, text: str) -> Iterator[Progress]:
        start = self._bar.n
        self._bar.set_postfix_str(text)

        def progress(done: int, total: int, _: str) -> None:
            self._bar.update(max(0.0, start + share * min(1.0, done / max(1, total)) - self._bar.n))

        yield progress
        progress(1, 1, "")

    def close(self) -> None:
        self._bar.close()


def run(out: str | os.PathLike[str], seeds: int = 2, use_comfyui: bool = True) -> str:
    """Do it all and return the table as text. Files land in ``out``, which is made; older demo files are replaced.

    use_comfyui: let a ComfyUI draw where one is found.
    """
    out, model = Path(out), asset(MODEL)
    if not model.exists():
        raise CalibQuantError(f"{model}: the demo model is missing: reinstall the pack")
    try:
        out.mkdir(parents=True, exist_ok=True)
        comfyui = find_comfyui() if use_comfyui else None
    except OSError as e:
        raise CalibQuantError(f"{out}: {e}") from e
    with Source(model) as source:
        wanted = _recipes(source)
        drawn = 1 + len(wanted)
        work = CALIBRATING + sum(GPTQ if gptq else NEAREST for _, gptq in wanted) + 2 * drawn * DRAWING
        bar = Bar(work + (STARTING if comfyui else 0))
        with contextlib.closing(bar):
            made = [Made("16-bit source", model, model.stat().st_size), *_quantize_all(source, wanted, out, bar)]
            rows, notes = _draw(made, comfyui, out / "latents.npz", seeds, bar)
    return "\n".join([results.table(rows), *notes, *_closing(rows, out, seeds)])


def _recipes(source: Source) -> list[tuple[recipes.Recipe, bool]]:
    """Those for the source's family, each with whether the calibration is used."""
    family = source.architecture.name
    fitting = [recipe for recipe in recipes.RECIPES.values() if family in (recipe.architectures or family)]
    return [(r, gptq) for r in fitting for gptq in (False, True) if not gptq or r.name in CALIBRATED]


def _quantize_all(source: Source, wanted: Sequence[tuple[recipes.Recipe, bool]], out: Path, bar: Bar) -> list[Made]:
    with bar.piece(CALIBRATING, "calibrate") as progress:
        seen = _calibrate(source, progress)
    made = []
    for recipe, gptq in wanted:
        name = f"{recipe.name}-gptq" if gptq else recipe.name
        with bar.piece(GPTQ if gptq else NEAREST, f"quantize {name}") as progress:
            made.append(_quantize(source, recipe, name, seen if gptq else None, out, progress))
    return made


def _calibrate(source: Source, progress: Progress) -> Calibration:
    model, calls = wan.load(source.path), 0

    def called(*_: object) -> None:
        nonlocal calls
        progress(calls := calls + 1, len(SEEDS) * sampler.STEPS, "calibrate")

    return sampler.calibrate(model, source.architecture, SEEDS, called)


def _quantize(
    source: Source, recipe: recipes.Recipe, name: str, seen: Calibration | None, out: Path, progress: Progress
) -> Made:
    plan = recipes.make_plan(source, recipe)
    plan = plan if seen is None else recipes.calibrated(source, plan, seen)
    path, rounding = out / f"digits-{name}.safetensors", "nearest" if seen is None else "gptq"
    options = {"overwrite": True, "calibration": seen, "rounding": rounding, "verify": True, "progress": progress}
    report = jobs.quantize(source, plan, path, **options)
    layers = ", ".join(f"{n} {title(fmt)}" for fmt, n in report.count().items())
    return Made(name, path, report.bytes_after, layers, report.mean_error(), tuple(targets.needs(plan)))


def _draw(made: Sequence[Made], comfyui: Path | None, npz: Path, seeds: int, bar: Bar) -> tuple[list[Row], list[str]]:
    """Rows in the order of ``made``, and lines that say who drew."""
    loaded = [each.path for each in made if comfyui and each.loads_in(comfyui)]
    drawn, who = {}, "drawn by the built-in reference sampler"
    if comfyui:
        try:
            with bar.piece(STARTING + DRAWING * len(loaded), "ComfyUI draws") as progress:
                drawn = dict(zip(loaded, drawing.by_comfyui(comfyui, loaded, npz, seeds, progress), strict=True))
            who = f"drawn by {drawing.version(comfyui)} at {comfyui}"
        except CalibQuantError as e:
            who = f"drawn by the built-in reference sampler ({e})"
    rows = []
    for each in made:
        with bar.piece(DRAWING, f"draw {each.name}"):
            images = drawn[each.path] if each.path in drawn else drawing.built_in(each.path, seeds)
            mark = "*" if drawn and each.path not in drawn else ""
            rows.append(Row(each, images, drawing.built_in(each.path, seeds, "blackwell"), mark))
    notes = [f"{who}: 10 digits × {seeds} seeds, {sampler.STEPS} steps; n = {10 * seeds}"]
    if any(row.mark for row in rows):
        notes.append("* drawn by the built-in reference sampler: this ComfyUI is too old to load the file")
    return rows, notes


def _closing(rows: Sequence[Row], out: Path, seeds: int) -> list[str]:
    notes = [
        "inputs are INT8 in int8, w4a8 and w6a8 and 16-bit in the others, as on a card without FP4 and FP8; "
        "on RTX 50: SSIM with inputs rounded as that card does, emulated by the built-in sampler",
    ]
    baseline = results.other_seed(rows[0].images)
    if baseline is not None:
        notes.append(f"for scale: another seed in the 16-bit model has SSIM {baseline:.4f}")
    path = out / "samples.png"
    if not sheet.draw(rows, path):
        notes.append("no pictures and no SSIM without the extra: pip install calibquant[metrics]")
        path = out
    return [*notes, f"{results.sentence(rows, 'nvfp4', 'nvfp4-gptq')}. Pictures: {path.resolve()}"]
