"""What two models draw from the same noise: how far apart they are, and one sentence on what that means."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import CalibQuantError
from ..evidence.likeness import LEVEL, MOST_DB, SIGMA, Summary, summarize
from ..files.disk import NewFile, reason
from ..files.text import change_of_size, counted
from .report import Compared

# What a picture is called by its error as a share of what another seed makes. Demo model (n = 40, another seed .385):
# NVFP4 nearest 1/79 (SSIM .985), with searched scales 1/220 (.996), GPTQ 1/1100 (.999); as W4A4 1/54, 1/110, 1/120.
GRADES = (
    (1e-3, "Practically the same as the original"),
    (1e-2, "Close to the original"),
    (1e-1, "Visibly different from the original"),
    (math.inf, "Another picture than the original's"),
)
ACCEPTABLE = 1  # the last grade that asks for nothing
NOISE = 2.0  # within this many times what the original differs from itself, nothing is known of the other model
FEW = 4  # pictures; below it a mean is an anecdote
ADVICE = "use more bits, or calibrate and round with GPTQ"
MEASURES = {"latent_error": True, "psnr": False, "ssim": False, "lpips": True}  # whether larger is worse
TITLES = {"latent_error": "final latent, relative error", "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (alex)"}


@dataclass(frozen=True)
class Likeness:
    """Two samples. latent_error: ||A - B||^2 / ||A||^2 of the final latent, in the space the model works in."""

    latent_error: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


@dataclass(frozen=True)
class Picture(Likeness):
    number: int = 0  # from 1, prompt by prompt
    prompt: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """A call of the model in sampling. error: of what the step moves along, (x - x0) / sigma, at the original's x."""

    number: int
    sigma: float
    error: float
    n: int


@dataclass(frozen=True)
class Pace:
    """How one of the two ran. native: layers of the quantized ones that a kernel of their format multiplied."""

    seconds_per_step: float
    quantized: int = 0
    native: int = 0
    emulated: dict[str, int] = field(default_factory=dict)  # why the others were not -> how many


@dataclass(frozen=True)
class Comparison(Compared):
    """What both models drew. same_seed: the original against itself; other_seed: against itself from other noise."""

    settings: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    same_seed: list[Likeness] = field(default_factory=list)
    other_seed: list[Likeness] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    pace: dict[str, Pace] = field(default_factory=dict)  # "source", "output"
    missing: dict[str, str] = field(default_factory=dict)  # measure -> why it was not taken
    notes: list[str] = field(default_factory=list)

    def measure(self, name: str, of: str = "pictures") -> Summary | None:
        values = [getattr(one, name) for one in getattr(self, of)]
        return summarize([value for value in values if value is not None], MEASURES[name])

    def worst(self) -> Picture:
        return max(self.pictures, key=lambda picture: picture.latent_error)

    def share(self, error: float) -> float:
        """An error in units of what another seed makes of the picture."""
        other = self.measure("latent_error", "other_seed")
        return error / other.mean if other and other.mean else error

    def verdict(self) -> str:
        """One sentence to act on."""
        errors, noise = self.measure("latent_error"), self.measure("latent_error", "same_seed")
        assert errors is not None
        if errors.worst == 0:
            what = f"all {errors.n} latents are" if errors.n > 1 else "the latent is"
            return f"The same: {what} identical to the original's, number for number."
        if noise and errors.mean <= NOISE * noise.mean:
            return "As close to the original as the original is to itself when it is drawn again: nothing was lost."
        level, worst = grade(self.share(errors.mean)), self.worst()
        facts = [f"{closer(self.share(errors.mean))}× closer than another seed"]
        ssim = self.measure("ssim")
        facts += [f"mean SSIM {ssim.mean:.3f}"] if ssim else []
        sentence = f"{GRADES[level][1]}: {', '.join(facts)}"
        bad = sum(grade(self.share(one.latent_error)) > ACCEPTABLE for one in self.pictures)
        if bad and level <= ACCEPTABLE:
            return (
                f"{sentence}; but {bad} of {counted(errors.n, 'picture')} visibly different: look at #{worst.number}."
            )
        sentence += f"; the worst picture is #{worst.number}" if errors.n > 1 else ""
        return sentence + (f": {ADVICE}." if level > ACCEPTABLE else ".")

    def to_json(self) -> str:
        measured = {name: self.measure(name) for name in MEASURES}
        summed = {name: asdict(found) if found else None for name, found in measured.items()}
        return json.dumps({"verdict": self.verdict(), **summed, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def summary(self) -> str:
        """For the node: the verdict, a line for each measure, and how fast both ran."""
        lines = [self.verdict(), *(self._line(name) for name in MEASURES if self.measure(name))]
        return "\n".join([*lines, *self._missing(), *self._pace(), *self._notes()])

    def _line(self, name: str) -> str:
        found = self.measure(name)
        assert found is not None
        spread = f" ({between(name, found.interval)})" if found.interval else ""
        lines = f"{TITLES[name]}: {shown(name, found.mean)}{spread}, worst {shown(name, found.worst)}, n = {found.n}"
        again, other = (self.measure(name, of) for of in ("same_seed", "other_seed"))
        baselines = [f"drawn again {shown(name, again.mean)}"] if again else []
        baselines += [f"another seed {shown(name, other.mean)}"] if other else []
        return lines + (f" · {', '.join(baselines)}" if baselines else "")

    def _pace(self) -> list[str]:
        source, output = self.pace.get("source"), self.pace.get("output")
        if not source or not output:
            return []
        times = " → ".join(_seconds(one.seconds_per_step) for one in (source, output))
        lines = [f"a step: {times} ({source.seconds_per_step / max(output.seconds_per_step, 1e-9):.2f}× the speed)"]
        if output.quantized:
            lines.append(f"native kernel: {output.native} of {counted(output.quantized, 'quantized layer')}")
            lines[-1] += "".join(f"; {count}: {why}" for why, count in output.emulated.items())
        return lines

    def _notes(self) -> list[str]:
        few = [f"only {counted(len(self.pictures), 'picture')}: more prompts and seeds tell more"]
        size = [f"files: {change_of_size(self.bytes_before, self.bytes_after)}"]
        both = self.bytes_before and self.bytes_after
        return [*(size if both else []), *(few if len(self.pictures) < FEW else []), *self.notes]

    def to_markdown(self, picture: str = "") -> str:
        """The whole report as a page; picture: file name of the sheet beside it."""
        how = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        remarks = [*self._missing(), *self._pace(), *self._notes()]
        parts = [
            f"# {self.output or 'model_b'} against {self.source or 'model_a'}",
            f"**{self.verdict()}**",
            f"![both models, row by row]({picture})" if picture else "",
            table(self._measures()),
            "\n".join(f"- {remark}" for remark in [f"drawn with {how}", *remarks]),
            f"## Pictures\n\n{table(self._rows())}",
            self._steps(),
            f"## What the figures are\n\n{DEFINITIONS}",
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def _steps(self) -> str:
        if not self.steps:
            return ""
        rows = [[str(step.number), f"{step.sigma:.4g}", f"{step.error:.2e}"] for step in self.steps]
        words = f"mean of {counted(self.steps[0].n, 'sample')}, at the original's own x, so that errors do not add up"
        words = f"Relative error of what a step moves along, (x − x0) / sigma: {words}."
        return f"## Steps\n\n{words}\n\n{table([['call', 'sigma', 'error'], *rows])}"

    def _measures(self) -> list[list[str]]:
        rows = [["", "mean", f"{100 * LEVEL:.0f} % interval", "worst", "n", "drawn again", "another seed"]]
        for name in MEASURES:
            found, *baselines = (self.measure(name, of) for of in ("pictures", "same_seed", "other_seed"))
            if found:
                cells = [shown(name, found.mean), between(name, found.interval), shown(name, found.worst), str(found.n)]
                rows.append([TITLES[name], *cells, *(shown(name, b.mean) if b else "–" for b in baselines)])
        return rows

    def _missing(self) -> list[str]:
        return [f"{TITLES[name]}: not measured: {why}" for name, why in self.missing.items()]

    def _rows(self) -> list[list[str]]:
        taken = [name for name in MEASURES if self.measure(name)]
        rows = [["#", "seed", *(TITLES[name] for name in taken), "prompt"]]
        for one in self.pictures:
            prompt = " ".join(one.prompt.split()).replace("|", "\\|")
            rows.append([str(one.number), str(one.seed), *(shown(name, getattr(one, name)) for name in taken), prompt])
        return rows


DEFINITIONS = f"""\
- *Final latent, relative error*: ‖A − B‖² / ‖A‖² of each picture's final latent, in the space the model works in.
- *PSNR*: of decoded pictures in 0..1, at most {MOST_DB:.0f} dB.
- *SSIM*: scikit-image, Gaussian weights, sigma {SIGMA}, data range 1.0.
- *Interval*: {100 * LEVEL:.0f} % of a percentile bootstrap over pictures, of the mean.
- *Drawn again*: the original, sampled twice from the same noise. 0 where this machine repeats itself exactly.
- *Another seed*: the original against itself from other noise: what an unrelated picture of the same prompt scores.
- *× closer than another seed*: the root of the ratio of the two errors. Practically the same: 32× and more; close: 10×;
  visibly different: 3×; below that, another picture.
- *A step*: median seconds over the steps after the first of each sample, model calls only."""


def grade(share: float) -> int:
    """The index in GRADES of an error given as a share of another seed's."""
    return next(i for i, (limit, _) in enumerate(GRADES) if share <= limit)


def closer(share: float) -> str:
    """How many times closer than another seed: errors are squared, so the root."""
    times = 1 / math.sqrt(share)
    return f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return {"latent_error": f"{value:.2e}", "psnr": f"{value:.2f}"}.get(name, f"{value:.4f}")


def between(name: str, interval: tuple[float, float] | None) -> str:
    return "–".join(shown(name, end) for end in interval) if interval else "–"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def table(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def average(errors: dict[int, list[tuple[float, float]]]) -> list[Step]:
    """Steps of (sigma, error) of every sample, by the number of the call."""
    return [
        Step(number, found[0][0], fmean(error for _, error in found), len(found))
        for number, found in sorted(errors.items())
    ]


def save(files: dict[str | os.PathLike[str], bytes]) -> None:
    """Write new files that belong together: none of them has its name before all of them are written."""
    with contextlib.ExitStack() as stack:
        made = []
        for path, content in files.items():
            made.append(stack.enter_context(NewFile(Path(path))))
            try:
                made[-1].file.write(content)
            except OSError as e:
                raise CalibQuantError(f"{path}: cannot be written: {reason(e)}") from e
        for new in made:
            new.publish(overwrite=False)
