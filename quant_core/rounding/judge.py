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
    """

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor, limit: int = JUDGED_ROWS) -> None:
        self.rows = rows[:: max(1, len(rows) // limit)][:limit].float()  # from all over: prompts come one after another
        self.measures_outputs = len(rows) > 0
        weight = weight.float().cpu()
        self._unit, self._rows_unit = to_unit(weight), to_unit(self.rows)
        self._wanted = self._outputs(self.rows, weight) if self.measures_outputs else weight * self._unit
        self._energy = self._wanted.square().sum().item()

    def error(
        self, decoded: torch.Tensor, shift: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> float:
        """Of ``decoded`` [out, in]; shift: what the bias [out] was changed by; rows: the inputs as a loader feeds them.

        Without sampled inputs: the relative error of the weights.
        """
        if self.measures_outputs:
            got = self._outputs(self.rows if rows is None else rows, decoded)
            got = got if shift is None else got + shift * self._rows_unit * self._unit
        else:
            got = decoded * self._unit
        error = (got - self._wanted).square().sum().item()
        return error / self._energy if self._energy else error

    def _outputs(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (rows * self._rows_unit) @ (weight * self._unit).T


def as_loaded(fmt: Format, rows: torch.Tensor, entry: LayerPlan) -> torch.Tensor:
    """Inputs [n, in] as the loader feeds them to this layer: quantized to the layer's format, or exact.

    Without an ``input_scale`` FP8 uses 1.0 and NVFP4 the largest value of the batch; MXFP8 and INT8 scale as they go.
    """
    if not len(rows) or entry.full_precision or fmt.config() is None:
        return rows
    scale = None
    if entry.input_scale is not None:
        scale = torch.tensor(entry.input_scale)
    elif fmt.name == "nvfp4":
        scale = rows.abs().amax() / 2688
    elif fmt.name == "float8_e4m3fn":
        scale = torch.tensor(1.0)
    return fmt.decode(fmt.kernel(rows, scale), tuple(rows.shape))
