"""What an error-correction LoRA puts back."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from ..files.text import counted

SHOWN = 10  # layers, worst first
BYPASS = (
    "Load it with Load LoRA (Bypass, Model Only) at strength 1 on the MODEL of that file. The ordinary LoRA loader "
    "merges it into the quantized weights and rounds them again, which costs more than it brings (demo model, NVFP4 to "
    "nearest with a fitted LoRA, error of the final latent: .0080 without, .0028 by the bypass loader, .026 by the "
    "ordinary one)."
)
# Measured on the demo model as a GPU with NVFP4 runs it, mean layer error at rank 32: 4.81e-3 -> 5.08e-3.
BLIND = (
    "this file was rounded by GPTQ, whose errors cancel in the outputs, and the LoRA was made from its weights alone: "
    "it may cost more than it brings; give it a calibration"
)


@dataclass(frozen=True)
class LayerGain:
    """One layer. rank: 0 where nothing helped. Errors relative to the layer's outputs (or weights, see the report)."""

    name: str
    rank: int
    before: float
    after: float
    calibrated: bool


@dataclass(frozen=True)
class LoraReport:
    """What came out. runs: of the calibration, held out from the fit, that errors of outputs were measured on."""

    output: str
    nbytes: int
    rank: int
    layers: list[LayerGain] = field(default_factory=list)
    runs: int = 0
    note: str = ""

    def summary(self) -> str:
        """The worst layers before and after, and how to load the file."""
        corrected = [layer for layer in self.layers if layer.rank]
        lines = [
            f"{counted(len(corrected), 'layer')} of {len(self.layers)} corrected at rank {self.rank}, "
            f"{self.nbytes / 1e9:.3f} GB"
        ]
        for calibrated in (True, False):
            layers = [layer for layer in self.layers if layer.calibrated == calibrated]
            lines += self._table(layers, calibrated) if layers else []
        return "\n".join([*lines, *([f"warning: {self.note}"] if self.note else []), BYPASS])

    def _table(self, layers: list[LayerGain], calibrated: bool) -> list[str]:
        of = "weights (without inputs)"
        if calibrated:
            unseen = f"of {counted(self.runs, 'held-out run')}" if self.runs else "held out of the one run there is"
            of = f"outputs as loaded, on rows {unseen}"
        worst = sorted(layers, key=lambda layer: -layer.before)[:SHOWN]
        means = fmean(layer.before for layer in layers), fmean(layer.after for layer in layers)
        lines = [f"relative error of {of}, worst first", f"{'before':>11}{'after':>11}{'rank':>6}  layer"]
        lines += [f"{layer.before:>11.3e}{layer.after:>11.3e}{layer.rank:>6}  {layer.name}" for layer in worst]
        return [*lines, f"{means[0]:>11.3e}{means[1]:>11.3e}{'':>6}  mean of {counted(len(layers), 'layer')}"]
