"""Which rounding a layer gets, and what each way would have cost: the choices of one quantization job."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace

import torch

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration, LayerStats
from ..formats import FORMATS, FileTensors, Format
from . import gptq, hswq, smoothing
from .judge import Judge, as_loaded
from .layerplan import LayerPlan
from .pack import Packed, by_gptq, nearest, refuse_damaged, searched, squared_distance, squared_norm

AUTO = "auto"
CHOICES = (AUTO, "nearest", "search", "gptq")
FACTOR_BYTES = 1 << 30  # of Hessians and Cholesky factors kept for layers that share an input
# Without activations only NVFP4's block scales are worth searching: weight error -22 %, against 0 for MXFP8 and at
# most 1.5 % for FP8.
SEARCH_PAYS = ("nvfp4",)
WITH_BIAS = "+bias"  # after a rounding's name: the bias takes up the mean error


@dataclass(frozen=True)
class Rounded:
    """A packed layer, how it was rounded, why not otherwise, and the errors measured on the way.

    bias: the corrected bias in its own dtype, None where it stays. extra: further tensors of the layer in the file.
    output_errors: ingredient -> ||X (W - Q)^T - (b' - b)||^2 / ||X W^T||^2 on sampled inputs (weights only).
    loader_error: the same with the inputs quantized as the loader will; gains: hswq.Gains as a dict.
    """

    packed: Packed
    rounding: str
    note: str = ""
    output_errors: dict[str, float] = field(default_factory=dict)
    loader_error: float | None = None
    gains: dict[str, float] | None = None
    bias: torch.Tensor | None = None
    extra: FileTensors = field(default_factory=dict)


@dataclass(frozen=True)
class _Inputs:
    """What is known of a layer's inputs: sampled rows [n, in] (any float dtype), and the calibration's statistics."""

    rows: torch.Tensor
    stats: LayerStats

    def scaled(self, factor: torch.Tensor) -> _Inputs:
        """The inputs times ``factor`` [in]."""
        stats = replace(
            self.stats,
            input_mean=self.stats.input_mean * factor,
            input_sqmean=self.stats.input_sqmean * factor.square(),
            input_amax=self.stats.input_amax * factor,
        )
        return _Inputs(self.rows.float() * factor, stats)


@dataclass(frozen=True)
class _Task:
    """One layer to round: its plan entry, weight [out, in], bias [out], inputs; ``where`` begins error messages."""

    entry: LayerPlan
    weight: torch.Tensor
    where: str
    bias: torch.Tensor | None
    inputs: _Inputs | None

    @property
    def fmt(self) -> Format:
        return FORMATS[self.entry.format]

    def decode(self, packed: Packed) -> torch.Tensor:
        return self.fmt.decode(packed.tensors, tuple(self.weight.shape))


class Rounder:
    """Rounds the layers of one job. ``prefix`` is what layer names have in the file and not in the calibration."""

    def __init__(self, device: torch.device, calibration: Calibration | None, rounding: str, prefix: str = "") -> None:
        if rounding not in CHOICES:
            raise CalibQuantError(f"unknown rounding {rounding!r}: use one of {', '.join(CHOICES)}")
        if rounding == "gptq" and calibration is None:
            raise OptionError("--rounding gptq needs --calibration C: use search or nearest without one")
        self._device, self._calibration, self._rounding, self._prefix = device, calibration, rounding, prefix
        self._factors: OrderedDict[tuple[str, bool], gptq.Factor | str] = OrderedDict()

    def round(
        self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None = None
    ) -> Rounded:
        """Round ``[out, in]`` as the plan's entry and the job want it; CalibQuantError names ``where``.

        bias: float [out] of the layer, which may be corrected when the inputs are known.
        """
        seen = self._calibration.layers.get(layer.removeprefix(self._prefix)) if self._calibration else None
        task = _Task(entry, weight, where, bias, _Inputs(self._rows(seen.group), seen) if seen else None)
        if entry.rounding == "hswq":
            return self._hswq(task)
        if entry.pre_quant_scale:
            return self._smoothed(task)
        if weight.dim() != 2 or self._rounding == "nearest":
            return Rounded(nearest(weight, task.fmt, self._device, where), "nearest")
        if task.inputs is None:
            return self._without_inputs(task)
        return self._best(task, self._shared_factor(task.inputs, bias is not None))

    def _without_inputs(self, task: _Task) -> Rounded:
        note = "" if self._calibration is None else "not in the calibration"
        if self._rounding == AUTO and task.fmt.name not in SEARCH_PAYS:
            return Rounded(nearest(task.weight, task.fmt, self._device, task.where), "nearest", note)
        return Rounded(searched(task.weight, task.fmt, self._device, task.where), "search", note)

    def _best(self, task: _Task, factor: gptq.Factor | str) -> Rounded:
        """Of all ways that were asked for and are possible the one with the least output error, weights only.

        factor: for GPTQ, or why it is not possible ("": not asked for).
        """
        assert task.inputs is not None
        stats, how = task.inputs.stats, (task.fmt, self._device, task.where)
        packed = {"nearest": nearest(task.weight, *how)}
        if self._rounding != "nearest":
            packed["search"] = searched(task.weight, *how, stats.input_sqmean)
        if isinstance(factor, gptq.Factor):
            packed["gptq"] = by_gptq(task.weight, *how, factor)
        judge = Judge(task.weight, task.inputs.rows)
        errors: dict[str, float] = {}
        biases: dict[str, torch.Tensor] = {}
        for name, candidate in packed.items():
            decoded = task.decode(candidate)
            errors[name] = judge.error(decoded)
            if task.bias is not None and name != "nearest" and judge.measures_outputs:
                corrected = _corrected(task.bias, task.weight, decoded, stats.input_mean)
                biases[name + WITH_BIAS] = corrected
                errors[name + WITH_BIAS] = judge.error(decoded, corrected.float() - task.bias.float())
        best = min(reversed(errors), key=lambda name: errors[name])  # of equals the more elaborate
        chosen, last = best.removesuffix(WITH_BIAS), list(packed)[-1]
        note = factor if isinstance(factor, str) else ""
        if chosen != last:
            note = f"{last} was no better than {best} on the sampled inputs"
        bias = biases.get(best)
        shift = None if bias is None or task.bias is None else bias.float() - task.bias.float()
        loader = judge.error(task.decode(packed[chosen]), shift, as_loaded(task.fmt, judge.rows, task.entry))
        return Rounded(packed[chosen], best, note, errors, loader, bias=bias)

    def _smoothed(self, task: _Task) -> Rounded:
        """With ``pre_quant_scale``, of the alpha whose searched rounding has the least error as the loader runs it."""
        if task.inputs is None or not len(task.inputs.rows):
            raise CalibQuantError(
                f"{task.where}: {smoothing.KEY} needs a calibration with rows of this layer: give one"
            )
        refuse_damaged(task.weight, task.where)
        tried = {}
        for alpha in smoothing.ALPHAS:
            scale = smoothing.pre_quant_scale(task.weight, task.inputs.stats.input_absmean, alpha)
            stretched = _stretched(task, scale.float())
            packed = searched(stretched.weight, task.fmt, self._device, task.where, stretched.inputs.stats.input_sqmean)
            judge = Judge(stretched.weight, stretched.inputs.rows)
            fed = as_loaded(task.fmt, judge.rows, stretched.entry)
            tried[alpha] = judge.error(task.decode(packed), rows=fed), scale, stretched
        alpha = min(tried, key=lambda a: tried[a][0])
        _, scale, stretched = tried[alpha]
        done = self._best(stretched, self._factor(stretched.inputs, task.bias is not None))
        weight = task.weight.float()
        error = squared_distance(weight, task.decode(done.packed) * scale.float())  # of W, not of the stretched one
        extra = {smoothing.KEY: scale}
        if stretched.entry.input_scale is not None:
            extra["input_scale"] = torch.tensor(stretched.entry.input_scale)
        note = "; ".join(filter(None, [f"inputs smoothed with alpha {alpha:g}", done.note]))
        return replace(done, packed=Packed(done.packed.tensors, error, squared_norm(weight)), note=note, extra=extra)

    def _hswq(self, task: _Task) -> Rounded:
        if task.inputs is None:
            raise CalibQuantError(f"{task.where}: rounding hswq needs a calibration of this layer: give one")
        plain = nearest(task.weight, task.fmt, self._device, task.where)  # raises the one error for NaN and Inf
        found = hswq.histogram(task.weight, task.inputs.stats.input_absmean)
        gains = asdict(hswq.gains(found))
        if task.fmt.config() is None:
            return Rounded(plain, "nearest", gains=gains)
        amax = hswq.search(found)[0]
        scale = torch.tensor(amax / hswq.TOP if amax else 1.0)
        return Rounded(nearest(task.weight, task.fmt, self._device, task.where, scale), "hswq", gains=gains)

    def _rows(self, group: str) -> torch.Tensor:
        sample = self._calibration.rows.get(group) if self._calibration else None
        return torch.empty(0, 0) if sample is None else sample.rows

    def _factor(self, inputs: _Inputs, centered: bool) -> gptq.Factor | str:
        """What GPTQ needs, or why there is none ("": it was not asked for)."""
        if self._rounding not in (AUTO, "gptq"):
            return ""
        if not len(inputs.rows):
            return "no input rows were sampled"
        return gptq.factor(inputs.rows.to(self._device), inputs.stats.input_mean.to(self._device) if centered else None)

    def _shared_factor(self, inputs: _Inputs, centered: bool) -> gptq.Factor | str:
        """The same for all layers of a group; the most recent ones are kept, bounded in bytes."""
        key = inputs.stats.group, centered
        if key not in self._factors:
            self._factors[key] = self._factor(inputs, centered)
            while len(self._factors) > 1 and sum(map(_nbytes, self._factors.values())) > FACTOR_BYTES:
                self._factors.popitem(last=False)
        self._factors.move_to_end(key)
        return self._factors[key]


def _nbytes(kept: gptq.Factor | str) -> int:
    return 0 if isinstance(kept, str) else kept.nbytes


def _corrected(
    bias: torch.Tensor, weight: torch.Tensor, decoded: torch.Tensor, input_mean: torch.Tensor
) -> torch.Tensor:
    """The bias, in its own dtype, that takes up the mean error E[x] (W - Q)^T of the outputs."""
    return (bias.float() + (weight.float().cpu() - decoded) @ input_mean).to(bias.dtype)


def _stretched(task: _Task, scale: torch.Tensor) -> _Task:
    """The same layer behind ``pre_quant_scale`` [in]: inputs times it, weight over it, activation scale to match."""
    assert task.inputs is not None
    entry, inputs = task.entry, task.inputs.scaled(scale)
    if entry.input_scale is not None:
        growth = float(inputs.stats.input_amax.max() / task.inputs.stats.input_amax.max())
        entry = replace(entry, input_scale=entry.input_scale * growth)
    return replace(task, entry=entry, weight=task.weight.float() / scale, inputs=inputs)
