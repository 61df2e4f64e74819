"""What came out of a job or a comparison: one entry per layer, and the few lines that sum them up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ..files.text import change_of_size, counted, gigabytes
from ..formats import FORMATS, SOURCE, title
from ..planning import folds as folding
from ..planning.folds import Fold

FEW_RUNS = 4  # below it, errors on other prompts were 3 to 7 times those on the calibration's own (demo model)
NOTES = 3  # reasons shown


@dataclass(frozen=True)
class LayerReport:
    """One layer of a finished file. error: ||W - Q||^2 / ||W||^2 (relative error of the weights; 0 when kept)."""

    name: str
    format: str
    error: float
    shape: tuple[int, ...]
    nbytes: int
    reason: str = ""
    gains: dict[str, float] | None = None  # importance-weighted relative error by ingredient (hswq.Gains)
    rounding: str = ""
    note: str = ""  # why not a better rounding
    output_errors: dict[str, float] = field(default_factory=dict)  # by ingredient, weights only, on sampled inputs
    loader_error: float | None = None  # of outputs with the inputs quantized as the loader will
    bias_change: float = 0.0  # norm of what was added to the bias
    held_out: int = 0  # runs, unseen by GPTQ, that output errors were measured on; 0: in-sample
    rank: int = 0  # of the branch
    unsplit_error: float | None = None  # loader_error without the branch
    fallback: str = ""  # what was done for want of GPU memory: in parts, on the CPU


@dataclass(frozen=True)
class Compared:
    """Two files, or two models loaded from them: what every report calls by the same names. bytes: of whole files."""

    source: str
    output: str
    architecture: str
    recipe: str
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0  # of the whole job


@dataclass(frozen=True)
class Report(Compared):
    """What came out of a file: one entry per layer."""

    layers: list[LayerReport] = field(default_factory=list)
    needs_comfyui: str = ""  # the first version that reads the file
    runs: int | None = None  # of the calibration that layers were rounded with
    folds: dict[str, Fold] = field(default_factory=dict)  # by group; see planning.folds
    lora: str = ""  # the file without which a split one is wrong
    lora_bytes: int = 0
    words: list[str] = field(default_factory=list)  # what to expect of the file (planning.targets)

    def count(self) -> dict[str, int]:
        counts = Counter(layer.format for layer in self.layers)
        return {name: counts[name] for name in (*FORMATS, SOURCE) if counts[name]}

    def worst(self) -> LayerReport | None:
        """The quantized layer with the largest relative error."""
        quantized = [layer for layer in self.layers if layer.format != SOURCE]
        return max(quantized, key=lambda layer: layer.error, default=None)

    def mean_error(self) -> float:
        """Mean relative weight error of the quantized layers, every layer counting the same."""
        errors = [layer.error for layer in self.layers if layer.format != SOURCE]
        return fmean(errors) if errors else 0.0

    def to_json(self) -> str:
        entries = asdict(self)
        for fold in entries["folds"].values():
            del fold["exponents"]
        return json.dumps(entries, indent=1) + "\n"

    def facts(self) -> dict[str, Any]:
        """What programs ask for: sizes, layers by format, relative errors of weights and of outputs as loaded."""
        worst, loaded = self.worst(), [e for e in (layer.loader_error for layer in self.layers) if e is not None]
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "formats": self.count(),
            "errors": {
                "mean": self.mean_error(),
                "worst": worst.error if worst else 0.0,
                "worst_layer": worst.name if worst else "",
                "outputs_as_loaded": fmean(loaded) if loaded else None,
            },
            "core_needed": self.needs_comfyui,
        }

    def summary(self) -> str:
        """For the node and the terminal: size, layers per format, worst layer, and all that was said of it."""
        saved = 100 * (1 - self.bytes_after / self.bytes_before) if self.bytes_before else 0.0
        counts = " · ".join(f"{n} {title(fmt)}" for fmt, n in self.count().items())
        lines = [f"{change_of_size(self.bytes_before, self.bytes_after)} (−{saved:.0f} %)"]
        lines += [f"layers: {counts}"] * bool(counts)
        worst = self.worst()
        if worst:
            lines.append(f"worst layer: {worst.name} ({title(worst.format)}), relative weight error {worst.error:.2e}")
        measured = [*self._rounding(), *self._compromises(), *self._gains(), *folding.summary(self.folds)]
        return "\n".join([*lines, *self._fallbacks(), *self.words, *self._split(), *measured])

    def _fallbacks(self) -> list[str]:
        counts = Counter(layer.fallback for layer in self.layers if layer.fallback)
        how = ", ".join(f"{counted(n, 'layer')} {fallback}" for fallback, n in counts.items())
        return [f"warning: the GPU's memory ran out: rounded {how} (same errors, not the same bits)"] if how else []

    def _split(self) -> list[str]:
        """How to load a file that is wrong by itself."""
        if not self.lora:
            return []
        ranks = [layer.rank for layer in self.layers if layer.rank]
        what = f", ranks {min(ranks)} to {max(ranks)}, mean {fmean(ranks):.1f} of {len(ranks)} layers" if ranks else ""
        return [
            f"wrong without its LoRA {self.lora} ({gigabytes(self.lora_bytes)}{what})",
            "to load: the node Load Split Model; or Load Diffusion Model, then LoraLoaderBypassModelOnly at strength 1",
            "never an ordinary LoRA loader (it merges and rounds again) or a second bypass loader (it drops the first)",
        ]

    def _rounding(self) -> list[str]:
        """Mean output error by rounding, over the layers that were measured on sampled inputs."""
        measured = [layer for layer in self.layers if layer.output_errors]
        if not measured:
            return []
        parts = [f"{name} {fmean(errors):.2e}" for name, errors in self._by_ingredient(measured).items()]
        loader = [layer.loader_error for layer in measured if layer.loader_error is not None]
        parts += [f"as the loader runs it {fmean(loader):.2e}"] if loader else []
        split = [layer for layer in measured if layer.unsplit_error is not None]
        if split:
            before, after = fmean(layer.unsplit_error for layer in split), fmean(layer.loader_error for layer in split)
            parts += [f"of the {len(split)} layers with a branch {after:.2e}, {before:.2e} without"]
        used = Counter(layer.rounding for layer in measured if layer.rounding)
        lines = [f"output error {self._judged_on(measured)}, mean of {len(measured)} layers, weights only: "]
        lines[0] += ", ".join(parts)
        lines += [f"rounding: {', '.join(f'{n} {name}' for name, n in used.items())}"] if used else []
        if self.runs is not None and self.runs < FEW_RUNS:
            lines.append(f"warning: the calibration has few runs ({self.runs}): other prompts may lose more than this")
        return lines

    def _judged_on(self, measured: list[LayerReport]) -> str:
        """Whether the inputs of the output errors were unseen by the rounding."""
        if self.runs is None:
            return "on sampled inputs"
        seen = [layer for layer in measured if not layer.held_out]
        if len(seen) == len(measured):
            return f"in-sample ({self.runs} run{'s' * (self.runs != 1)})"
        some = f", {len(seen)} layers in-sample" * bool(seen)
        return f"held out ({max(layer.held_out for layer in measured)} of {self.runs} runs{some})"

    def _compromises(self) -> list[str]:
        """Why layers did not get the rounding that was asked for, the most frequent reasons first."""
        notes = Counter(layer.note for layer in self.layers if layer.note)
        return [f"{n} layer{'s' * (n != 1)}: {note}" for note, n in notes.most_common(NOTES)]

    @staticmethod
    def _by_ingredient(measured: list[LayerReport]) -> dict[str, list[float]]:
        """Output errors by ingredient, in the order in which they build on each other, and of what was chosen."""
        found: dict[str, list[float]] = {}
        for layer in measured:
            for name, error in layer.output_errors.items():
                found.setdefault(name, []).append(error)
        if any(layer.rounding for layer in measured):
            found["chosen"] = [layer.output_errors[layer.rounding] for layer in measured]
        return found

    def _gains(self) -> list[str]:
        """What each of HSWQ's ingredients gave, averaged over the layers it was used on."""
        measured = [layer.gains for layer in self.layers if layer.gains]
        if not measured:
            return []
        means = {name: sum(g[name] for g in measured) / len(measured) for name in measured[0]}
        plain = means["plain_cast"] or 1.0
        parts = [f"{name.replace('_', ' ')} {m:.2e} ({100 * (m / plain - 1):+.1f} %)" for name, m in means.items()]
        return [f"HSWQ, importance-weighted error, mean of {len(measured)} layers: " + ", ".join(parts)]
