"""Which rounding a layer gets, and what each way would have cost: the choices of one quantization job."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration, LayerStats
from ..formats import FORMATS, FileTensors, Format, turn
from . import gptq, hswq, smoothing
from .judge import Judge, as_loaded
from .layerplan import LayerPlan
from .pack import Packed, by_gptq, nearest, refuse_damaged, searched, shared_scale, squared_distance, squared_norm

AUTO = "auto"
CHOICES = (AUTO, "nearest", "search", "gptq")
JUDGED_OUTPUTS = 256  # of a layer: so that GPTQ on fewer runs, which only judges it, costs little
FACTOR_BYTES = 1 << 30  # of Hessians and Cholesky factors kept for layers that share an input
# Without activations only NVFP4's block scales are worth searching: weight error -22 %, against 0 for MXFP8 and at
# most 1.5 % for FP8.
SEARCH_PAYS = ("nvfp4",)
# Of GPTQ's error when a trial is judged by held-out runs: a trial is fitted to fewer runs than the file will be. Demo
# model, NVFP4, true error of 4 / 8 runs: 1.56e-3 / 1.42e-3 without it, 1.52e-3 / 1.00e-3 with .5 or .25.
TRIAL_HANDICAP = 0.5
WITH_BIAS = "+bias"  # after a rounding's name: the bias takes up the mean error


@dataclass(frozen=True)
class Rounded:
    """A packed layer, how it was rounded, why not otherwise, and the errors measured on the way.

    bias: the corrected bias in its own dtype, None where it stays. extra: further tensors of the layer in the file.
    output_errors: ingredient -> ||X (W - Q)^T - (b' - b)||^2 / ||X W^T||^2 on sampled inputs (weights only).
    loader_error: the same with the inputs quantized as the loader will; gains: hswq.Gains as a dict.
    held_out: the number of runs, unseen by GPTQ, that these errors were measured on; 0: on what it was fitted to.
    """

    packed: Packed
    rounding: str
    note: str = ""
    output_errors: dict[str, float] = field(default_factory=dict)
    loader_error: float | None = None
    gains: dict[str, float] | None = None
    bias: torch.Tensor | None = None
    extra: FileTensors = field(default_factory=dict)
    held_out: int = 0


@dataclass(frozen=True)
class _Inputs:
    """What is known of a layer's inputs: sampled rows [n, in] (any float dtype), and the calibration's statistics.

    held_out: bool [n], the rows of ``runs`` runs that judge what was fitted to the others; none where there is one run.
    """

    rows: torch.Tensor
    stats: LayerStats
    held_out: torch.Tensor
    runs: int

    @property
    def fitted(self) -> torch.Tensor:
        return self.rows[~self.held_out] if self.runs else self.rows

    @property
    def fitted_mean(self) -> torch.Tensor:
        """E[x] float32 [in], without the runs that judge."""
        return self.fitted.float().mean(0) if self.runs else self.stats.input_mean

    @property
    def judged(self) -> torch.Tensor:
        return self.rows[self.held_out] if self.runs else self.rows

    def scaled(self, factor: torch.Tensor) -> _Inputs:
        """The inputs times ``factor`` [in]."""
        stats = replace(
            self.stats,
            input_mean=self.stats.input_mean * factor,
            input_sqmean=self.stats.input_sqmean * factor.square(),
            input_amax=self.stats.input_amax * factor,
        )
        return replace(self, rows=self.rows.float() * factor, stats=stats)


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

    @property
    def rotation(self) -> int:
        return self.fmt.rotation(self.weight.shape[1])

    def importance(self) -> torch.Tensor:
        """E[x^2] in the format's own basis, float32 [in]; without sampled rows as if inputs were independent."""
        assert self.inputs is not None
        known, size = self.inputs.stats.input_sqmean, self.rotation
        if not size:
            return known
        if not len(self.inputs.rows):
            return known.view(-1, size).mean(1, keepdim=True).expand(-1, size).reshape(-1)
        return turn(self.inputs.rows.float(), size).square().mean(0)

    def decode(self, packed: Packed) -> torch.Tensor:
        return self.fmt.decode(packed.tensors, tuple(self.weight.shape))


@dataclass(frozen=True)
class _Tried:
    """Roundings of some outputs of a layer, the simplest first: packed, and decoded to float32 [outputs, in].

    errors, best, shift, loader: what ``_judge`` says of them.
    """

    part: _Task
    outputs: torch.Tensor
    packed: dict[str, Packed]
    decoded: dict[str, torch.Tensor]
    errors: dict[str, float]
    best: str
    shift: torch.Tensor | None
    loader: float


@dataclass(frozen=True)
class Trial:
    """What rounding a layer would cost, from some of its outputs.

    error: of outputs as the loader runs the layer, on inputs that GPTQ was not fitted to where there are several runs;
    of the weights where no inputs are known. changes: input rows float32 [n, in] -> what becomes of the outputs
    [n, out]: what the rounding of inputs does to all of them, what that of weights does to those that were tried,
    scaled so that sums over outputs are right in expectation.
    """

    rounding: str
    error: float
    changes: Callable[[torch.Tensor], torch.Tensor]


# Layer, whether its held-out inputs count too -> what GPTQ needs, or why there is none
_FactorOf = Callable[[_Task, bool], gptq.Factor | str]


class Rounder:
    """Rounds the layers of one job. ``prefix`` is what layer names have in the file and not in the calibration."""

    def __init__(self, device: torch.device, calibration: Calibration | None, rounding: str, prefix: str = "") -> None:
        if rounding not in CHOICES:
            raise CalibQuantError(f"unknown rounding {rounding!r}: use one of {', '.join(CHOICES)}")
        if rounding == "gptq" and calibration is None:
            raise OptionError("rounding gptq needs a calibration: give one, or use search or nearest")
        self._device, self._calibration, self._rounding, self._prefix = device, calibration, rounding, prefix
        self._factors: OrderedDict[tuple[str, int, bool, bool], gptq.Factor | str] = OrderedDict()

    def round(
        self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None = None
    ) -> Rounded:
        """Round ``[out, in]`` as the plan's entry and the job want it; CalibQuantError names ``where``.

        bias: float [out] of the layer, which may be corrected when the inputs are known.
        """
        task = self._task(layer, entry, weight, where, bias)
        if entry.rounding == "hswq" and self._rounding == AUTO:
            return self._hswq(task)
        if entry.pre_quant_scale:
            return self._smoothed(task)
        if weight.dim() != 2 or self._rounding == "nearest":
            return Rounded(nearest(weight, task.fmt, self._device, where), "nearest")
        if task.inputs is None:
            return self._without_inputs(task)
        return self._best(task, self._shared_factor)

    def trial(
        self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None = None
    ) -> Trial:
        """What ``round`` would cost, measured on JUDGED_OUTPUTS of the outputs: a small part of its time.

        As for ``round``; entries with a rounding of their own or with ``pre_quant_scale`` cannot be tried.
        """
        task = self._task(layer, entry, weight, where, bias)
        factor: gptq.Factor | str = ""
        if task.inputs and self._rounding != "nearest":
            few = gptq.too_few(task.inputs.rows, gptq.MIN_ROWS)
            factor = few or self._shared_factor(task, not task.inputs.runs)
        tried = self._try(task, factor)
        name = self._plain_way(task) if task.inputs is None else tried.best
        decoded = tried.decoded[name.removesuffix(WITH_BIAS)]
        error = tried.loader if name == tried.best else tried.errors[name]
        return Trial(name, error, lambda rows: _changes(task, tried, decoded, rows.float()))

    def _task(self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None) -> _Task:
        seen = self._calibration.layers.get(layer.removeprefix(self._prefix)) if self._calibration else None
        return _Task(entry, weight, where, bias, self._inputs(seen) if seen else None)

    def _plain_way(self, task: _Task) -> str:
        """The rounding of a layer whose inputs are not known."""
        if self._rounding == "nearest" or (self._rounding == AUTO and task.fmt.name not in SEARCH_PAYS):
            return "nearest"
        return "search"

    def _without_inputs(self, task: _Task) -> Rounded:
        note = "" if self._calibration is None or self._rounding == "search" else "no GPTQ: not in the calibration"
        way = self._plain_way(task)
        return Rounded(self._pack(task, way, ""), way, note)

    def _best(self, task: _Task, factor_of: _FactorOf) -> Rounded:
        """Of all ways that were asked for and are possible the one with the least output error, weights only.

        GPTQ is judged by what it makes of runs that it was not fitted to, if there are several. What goes into the file
        is then fitted to all of them: 6 % less error on other prompts with 45 runs, 12 % with 20 (demo model, NVFP4).
        """
        assert task.inputs is not None
        inputs = task.inputs
        whole = factor_of(task, True)
        fitted = factor_of(task, False) if inputs.runs and not isinstance(whole, str) else whole
        tried = self._try(task, fitted)
        chosen = tried.best.removesuffix(WITH_BIAS)
        packed = tried.packed[chosen]
        if len(tried.outputs) < len(task.weight) or (chosen == "gptq" and inputs.runs):
            packed = self._pack(task, chosen, whole)
        bias = None
        if task.bias is not None and tried.best != chosen:
            bias = _corrected(task.bias, task.weight, task.decode(packed), inputs.stats.input_mean)
        note = _note(whole if isinstance(fitted, gptq.Factor) else fitted, tried.best, list(tried.packed)[-1])
        if not len(inputs.rows):  # chosen by the error of the weights
            return Rounded(packed, tried.best, note)
        return Rounded(packed, tried.best, note, tried.errors, tried.loader, bias=bias, held_out=inputs.runs)

    def _pack(self, task: _Task, how: str, factor: gptq.Factor | str) -> Packed:
        if how == "nearest":
            return nearest(task.weight, task.fmt, self._device, task.where)
        if how == "search":
            importance = task.importance() if task.inputs else None
            return searched(task.weight, task.fmt, self._device, task.where, importance)
        assert isinstance(factor, gptq.Factor)
        return by_gptq(task.weight, task.fmt, self._device, task.where, factor)

    def _try(self, task: _Task, factor: gptq.Factor | str) -> _Tried:
        """Every way that is asked for and possible, on JUDGED_OUTPUTS of the outputs: to the bit what the whole has."""
        fmt, outputs = task.fmt, _judged_outputs(len(task.weight))
        part = replace(task, weight=task.weight[outputs], bias=None if task.bias is None else task.bias[outputs])
        how = part.weight, fmt, self._device, task.where
        own = shared_scale(task.weight, fmt, self._device, task.where)
        packed = {"nearest": nearest(*how, own)}
        if self._rounding != "nearest":
            importance = task.importance() if task.inputs else None
            scale = own if fmt.group else shared_scale(task.weight, fmt, self._device, task.where, importance)
            packed["search"] = searched(*how, importance, scale)
        if isinstance(factor, gptq.Factor):
            packed["gptq"] = by_gptq(*how, factor, own)
        decoded = {name: part.decode(candidate) for name, candidate in packed.items()}
        return _Tried(part, outputs, packed, decoded, *_judge(part, decoded))

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
            judge = Judge(stretched.weight, stretched.inputs.fitted)
            fed = as_loaded(task.fmt, judge.rows, stretched.entry)
            tried[alpha] = judge.error(task.decode(packed), rows=fed), scale, stretched
        alpha = min(tried, key=lambda a: tried[a][0])
        _, scale, stretched = tried[alpha]
        done = self._best(stretched, self._factor)
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
        if task.fmt.config(tuple(task.weight.shape)) is None:
            return Rounded(plain, "nearest", gains=gains)
        amax = hswq.search(found)[0]
        scale = torch.tensor(amax / hswq.TOP if amax else 1.0)
        return Rounded(nearest(task.weight, task.fmt, self._device, task.where, scale), "hswq", gains=gains)

    def _inputs(self, seen: LayerStats) -> _Inputs:
        assert self._calibration is not None
        if seen.group not in self._calibration.rows:
            return _Inputs(torch.empty(0, 0), seen, torch.empty(0, dtype=torch.bool), 0)
        return _Inputs(self._calibration.rows[seen.group].rows, seen, *self._calibration.held_out(seen.group))

    def _factor(self, task: _Task, everything: bool) -> gptq.Factor | str:
        """What GPTQ needs, or why there is none ("": it was not asked for). everything: the held-out rows too."""
        assert task.inputs is not None
        inputs, size = task.inputs, task.rotation
        if self._rounding not in (AUTO, "gptq"):
            return ""
        if not len(inputs.rows):
            return "no input rows were sampled"
        if everything or not inputs.runs:
            rows, mean, least = inputs.rows, inputs.stats.input_mean, gptq.MIN_ROWS
        else:  # the judge will say whether they were too few
            rows, mean, least = inputs.fitted, inputs.fitted_mean, 1
        mean = turn(mean.unsqueeze(0), size).squeeze(0).to(self._device)
        return gptq.factor(turn(rows.to(self._device), size), None if task.bias is None else mean, least)

    def _shared_factor(self, task: _Task, everything: bool) -> gptq.Factor | str:
        """The same for all layers of a group; the most recent ones are kept, bounded in bytes."""
        assert task.inputs is not None
        key = task.inputs.stats.group, task.rotation, task.bias is not None, everything
        if key not in self._factors:
            self._factors[key] = self._factor(task, everything)
            while len(self._factors) > 1 and sum(map(_nbytes, self._factors.values())) > FACTOR_BYTES:
                self._factors.popitem(last=False)
        self._factors.move_to_end(key)
        return self._factors[key]


def _nbytes(kept: gptq.Factor | str) -> int:
    return 0 if isinstance(kept, str) else kept.nbytes


def _note(factor: gptq.Factor | str, best: str, last: str) -> str:
    """What the user should know of a choice; last: the most elaborate rounding that was tried."""
    if factor and isinstance(factor, str):
        return f"no GPTQ: {factor}"
    if best.removesuffix(WITH_BIAS) != last:
        return f"{last} was no better than {best}"
    return factor.note if isinstance(factor, gptq.Factor) else ""


def _judged_outputs(count: int) -> torch.Tensor:
    """Which outputs of a layer are judged, int64: from all over, because those of q, k and v come one after another."""
    return torch.linspace(0, count - 1, min(count, JUDGED_OUTPUTS), dtype=torch.float64).long()


def _judge(task: _Task, decoded: dict[str, torch.Tensor]) -> tuple[dict[str, float], str, torch.Tensor | None, float]:
    """Output errors of roundings (name -> weight [out, in]) and, where it helps, of each with a corrected bias.

    Then the name of the best, of equals the more elaborate, what it adds to the bias, and its error as the loader runs
    it. Without inputs: errors of the weights.
    """
    judge = Judge(task.weight, torch.empty(0, 0) if task.inputs is None else task.inputs.judged)
    errors: dict[str, float] = {}
    shifts: dict[str, torch.Tensor] = {}
    for name, weight in decoded.items():
        errors[name] = judge.error(weight)
        if task.bias is not None and name != "nearest" and task.inputs and judge.measures_outputs:
            bias = _corrected(task.bias, task.weight, weight, task.inputs.fitted_mean)
            shifts[name + WITH_BIAS] = shift = bias.float() - task.bias.float()
            errors[name + WITH_BIAS] = judge.error(weight, shift)
    runs = task.inputs.runs if task.inputs else 0
    handicap = {name: TRIAL_HANDICAP if runs and name.startswith("gptq") else 1.0 for name in errors}
    best = min(reversed(errors), key=lambda name: errors[name] * handicap[name])
    fed = as_loaded(task.fmt, judge.rows, task.entry)
    shift = shifts.get(best)
    return errors, best, shift, judge.error(decoded[best.removesuffix(WITH_BIAS)], shift, fed)


def _changes(task: _Task, tried: _Tried, decoded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """X W^T - X' Q^T - (b' - b), float32 [n, out], of rows X and the X' that the loader makes of them.

    What is not tried of the weights stands in for by the rest, times a factor that keeps the sum of squares.
    """
    fed, weight = as_loaded(task.fmt, rows, task.entry), task.weight.float().cpu()
    changed = (rows - fed) @ weight.T
    own = fed @ (weight[tried.outputs] - decoded).T
    own = own if tried.shift is None else own - tried.shift
    changed[:, tried.outputs] += own * (len(weight) / len(tried.outputs)) ** 0.5
    return changed


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
