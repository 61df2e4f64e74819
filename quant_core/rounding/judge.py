"""How much of a layer's output a rounding costs, on sampled inputs; exact or as the loader feeds them."""

from __future__ import annotations

import torch

from ..formats import Format
from .gptq import to_unit
from .layerplan import LayerPlan

JUDGED_ROWS = 512  # of the sampled inputs on which output errors are measured


class Judge:
    """Output error of a rounded weight on sampled inputs, ||X (W - Q)^T||^2 / ||X W^T||^2.

    Both are taken in units of powers of two, which the ratio does not see, so that no square leaves float32.
    whole: what ``weight`` is the rest of after a split; errors are then relative to its outputs, and stay absolute ones
    of the two together, because the branch is exact.
    """

    def __init__(
        self, weight: torch.Tensor, rows: torch.Tensor, limit: int = JUDGED_ROWS, whole: torch.Tensor | None = None
    ) -> None:
        self.rows = rows[:: max(1, len(rows) // limit)][:limit].float()  # from all over: prompts come one after another
        self.measures_outputs = len(rows) > 0
        weight = weight.float().cpu()
        whole = weight if whole is None else whole.float().cpu()
        self._unit, self._rows_unit = to_unit(whole), to_unit(self.rows)
        self._wanted = self._of(weight)
        self._energy = (self._wanted if whole is weight else self._of(whole)).square().sum().item()

    def error(
        self, decoded: torch.Tensor, shift: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> float:
        """Of ``decoded`` [out, in]; shift: what the bias [out] was changed by; rows: the inputs as a loader feeds them.

        Without sampled inputs: the relative error of the weights.
        """
        got = self._of(decoded, rows)
        if shift is not None and self.measures_outputs:
            got = got + shift * self._rows_unit * self._unit
        error = (got - self._wanted).square().sum().item()
        return error / self._energy if self._energy else error

    def _of(self, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Its outputs [n, out], or without sampled inputs the weight itself."""
        if not self.measures_outputs:
            return weight * self._unit
        return ((self.rows if rows is None else rows) * self._rows_unit) @ (weight * self._unit).T


def as_loaded(fmt: Format, rows: torch.Tensor, entry: LayerPlan) -> torch.Tensor:
    """Inputs [n, in] as the loader feeds them to this layer: quantized to the layer's format, or exact."""
    if not len(rows) or entry.full_precision:
        return rows
    scale = entry.input_scale
    return fmt.feed(rows, None if scale is None else torch.tensor(scale, device=rows.device))
