"""Which rounding a layer gets, and what each way would have cost: the choices of one quantization job."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field

import torch

from . import gptq, hswq
from .calibration import Calibration, LayerStats
from .errors import CalibQuantError
from .formats import FORMATS, Format
from .pack import Packed, by_gptq, nearest, searched
from .plan import LayerPlan

AUTO = "auto"
CHOICES = (AUTO, "nearest", "search", "gptq")
JUDGED_ROWS = 512  # of the sampled inputs on which output errors are measured
FACTOR_BYTES = 512 << 20  # of Cholesky factors kept for layers that share an input
# Without activations only NVFP4's block scales are worth searching: weight error -22 %, against 0 for MXFP8 and at
# most 1.5 % for FP8.
SEARCH_PAYS = ("nvfp4",)


@dataclass(frozen=True)
class Rounded:
    """A packed layer, how it was rounded, why not otherwise, and the errors measured on the way.

    output_errors: rounding -> ||X (W - Q)^T||^2 / ||X W^T||^2 on sampled inputs (weights only).
    loader_error: the same with the inputs quantized as the loader will; gains: hswq.Gains as a dict.
    """

    packed: Packed
    rounding: str
    note: str = ""
    output_errors: dict[str, float] = field(default_factory=dict)
    loader_error: float | None = None
    gains: dict[str, float] | None = None


class Rounder:
    """Rounds the layers of one job. ``prefix`` is what layer names have in the file and not in the calibration."""

    def __init__(self, device: torch.device, calibration: Calibration | None, rounding: str, prefix: str = "") -> None:
        if rounding not in CHOICES:
            raise CalibQuantError(f"unknown rounding {rounding!r}: use one of {', '.join(CHOICES)}")
        if rounding == "gptq" and calibration is None:
            raise CalibQuantError("--rounding gptq needs --calibration C: use search or nearest without one")
        self._device, self._calibration, self._rounding, self._prefix = device, calibration, rounding, prefix
        self._factors: OrderedDict[str, gptq.Factor | str] = OrderedDict()

    def round(self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str) -> Rounded:
        """Round ``[out, in]`` as the plan's entry and the job want it; CalibQuantError names ``where``."""
        fmt = FORMATS[entry.format]
        seen = self._calibration.layers.get(layer.removeprefix(self._prefix)) if self._calibration else None
        if entry.rounding == "hswq":
            return self._hswq(weight, fmt, where, seen)
        if weight.dim() != 2 or self._rounding == "nearest":
            return Rounded(nearest(weight, fmt, self._device, where), "nearest")
        if seen is None:
            return self._without_inputs(weight, fmt, where)
        return self._with_inputs(entry, weight, fmt, where, seen)

    def _without_inputs(self, weight: torch.Tensor, fmt: Format, where: str) -> Rounded:
        note = "" if self._calibration is None else "not in the calibration"
        if self._rounding == AUTO and fmt.name not in SEARCH_PAYS:
            return Rounded(nearest(weight, fmt, self._device, where), "nearest", note)
        return Rounded(searched(weight, fmt, self._device, where), "search", note)

    def _with_inputs(
        self, entry: LayerPlan, weight: torch.Tensor, fmt: Format, where: str, seen: LayerStats
    ) -> Rounded:
        candidates = {"nearest": nearest(weight, fmt, self._device, where)}
        candidates["search"] = searched(weight, fmt, self._device, where, seen.input_sqmean)
        note = ""
        if self._rounding in (AUTO, "gptq"):
            inputs = self._factor(seen.group)
            if isinstance(inputs, str):
                note = inputs
            else:
                candidates["gptq"] = by_gptq(weight, fmt, self._device, where, inputs)
        judge = Judge(weight, self._rows(seen.group))
        errors = {name: judge.error(fmt, packed) for name, packed in candidates.items()}
        best = min(reversed(errors), key=lambda name: errors[name])  # of equals the more elaborate
        if best != list(candidates)[-1]:
            note = f"{list(candidates)[-1]} was no better than {best} on the sampled inputs"
        loader = judge.error(fmt, candidates[best], entry)
        return Rounded(candidates[best], best, note, errors, loader)

    def _hswq(self, weight: torch.Tensor, fmt: Format, where: str, seen: LayerStats | None) -> Rounded:
        if seen is None:
            raise CalibQuantError(f"{where}: rounding hswq needs a calibration of this layer: give one")
        plain = nearest(weight, fmt, self._device, where)  # raises the one error for NaN and Inf
        found = hswq.histogram(weight, seen.input_absmean)
        gains = asdict(hswq.gains(found))
        if fmt.config() is None:
            return Rounded(plain, "nearest", gains=gains)
        amax = hswq.search(found)[0]
        scale = torch.tensor(amax / hswq.TOP if amax else 1.0)
        return Rounded(nearest(weight, fmt, self._device, where, scale), "hswq", gains=gains)

    def _rows(self, group: str) -> torch.Tensor:
        sample = self._calibration.rows.get(group) if self._calibration else None
        return torch.empty(0, 0) if sample is None else sample.rows

    def _factor(self, group: str) -> gptq.Factor | str:
        """The factor of a group's inputs; the most recent ones are kept, bounded in bytes."""
        if group not in self._factors:
            rows = self._rows(group).to(self._device)
            self._factors[group] = gptq.factor(rows) if len(rows) else "no input rows were sampled"
            while len(self._factors) > 1 and sum(map(_nbytes, self._factors.values())) > FACTOR_BYTES:
                self._factors.popitem(last=False)
        self._factors.move_to_end(group)
        return self._factors[group]


def _nbytes(kept: gptq.Factor | str) -> int:
    return 0 if isinstance(kept, str) else kept.upper.nbytes


class Judge:
    """Output error of a rounded weight on sampled inputs, ||X (W - Q)^T||^2 / ||X W^T||^2."""

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor) -> None:
        self._weight = weight.float().cpu()
        self._rows = rows[:JUDGED_ROWS].float()
        self._wanted = self._rows @ self._weight.T if len(rows) else None

    def error(self, fmt: Format, packed: Packed, entry: LayerPlan | None = None) -> float:
        """With ``entry`` the inputs are quantized as the loader will; without, they are exact.

        Without sampled inputs: the relative error of the weights.
        """
        if self._wanted is None:
            return packed.error / packed.energy if packed.energy else packed.error
        rows = self._rows if entry is None else as_loaded(fmt, self._rows, entry)
        got = rows @ fmt.decode(packed.tensors, tuple(self._weight.shape)).T
        energy = self._wanted.square().sum().item()
        return (got - self._wanted).square().sum().item() / energy if energy else 0.0


def as_loaded(fmt: Format, rows: torch.Tensor, entry: LayerPlan) -> torch.Tensor:
    """Inputs [n, in] as the loader feeds them to this layer: quantized to the layer's format, or exact.

    Without an ``input_scale`` FP8 uses 1.0 and NVFP4 the largest value of the batch; MXFP8 and INT8 scale as they go.
    """
    if entry.full_precision or fmt.config() is None:
        return rows
    scale = None
    if entry.input_scale is not None:
        scale = torch.tensor(entry.input_scale)
    elif fmt.name == "nvfp4":
        scale = rows.abs().amax() / 2688
    elif fmt.name == "float8_e4m3fn":
        scale = torch.tensor(1.0)
    return fmt.decode(fmt.kernel(rows, scale), tuple(rows.shape))
