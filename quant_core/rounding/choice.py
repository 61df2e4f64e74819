"""Which rounding a layer gets, and what each way would have cost: the choices of one quantization job."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration, LayerStats
from ..formats import FileTensors, Format, turn
from . import gptq, hswq, smoothing, split
from .judge import Judge, as_loaded
from .layerplan import LayerPlan
from .pack import Packed, by_gptq, nearest, refuse_damaged, searched, shared_scale, squared_distance, squared_norm
from .parallel import one_thread
from .room import CPU, Room, in_room
from .task import Inputs, Task
from .trial import WITH_BIAS, Trial, Tried, changes, changes_of_inputs, corrected, judge, judged_outputs

AUTO = "auto"
CHOICES = (AUTO, "nearest", "search", "gptq")
FACTOR_BYTES = 1 << 29  # of Hessians and Cholesky factors kept for layers that share an input
# Without activations only NVFP4's block scales are worth searching: weight error -22 %, against 0 for MXFP8 and at
# most 1.5 % for FP8.
SEARCH_PAYS = ("nvfp4",)


@dataclass(frozen=True)
class Rounded:
    """A packed layer, how it was rounded, why not otherwise, and the errors measured on the way.

    bias: the corrected bias in its own dtype, None where it stays. extra: further tensors of the layer in the file.
    output_errors: ingredient -> ||X (W - Q)^T - (b' - b)||^2 / ||X W^T||^2 on sampled inputs (weights only).
    loader_error: the same with the inputs quantized as the loader will; gains: hswq.Gains as a dict.
    held_out: the number of runs, unseen by GPTQ, that these errors were measured on; 0: on what it was fitted to.
    branch: what was split off before rounding; errors are those of the two together, relative to the whole layer.
    unsplit_error: loader_error without the branch.
    fallback: what was done for want of GPU memory (``room``).
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
    branch: split.Branch | None = None
    unsplit_error: float | None = None
    fallback: str = ""


@dataclass(frozen=True)
class _Choice:
    """The best of what was tried of a layer. whole: what GPTQ needs, of all rows; packed: of the layer, where it is all
    that was tried and holds for the file, too."""

    tried: Tried
    whole: gptq.Factor | str
    note: str
    packed: Packed | None


# Layer, whether its held-out inputs count too -> what GPTQ needs, or why there is none
_FactorOf = Callable[[Task, bool], gptq.Factor | str]


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_ladder(method: Method) -> Method:
    """A Rounder's method: where the GPU's memory runs out tried again in parts, then on the CPU."""

    @wraps(method)
    def tried(self: Rounder, *args: Any, **kwargs: Any) -> Any:
        def attempt(room: Room) -> Any:
            self._room = room
            return method(self, *args, **kwargs)

        done, room = in_room(self._device, attempt, self._forget_device)
        fallback = room.fallback(self._device)
        return replace(done, fallback=fallback) if fallback and isinstance(done, Rounded) else done

    return cast("Method", tried)


class Rounder:
    """Rounds the layers of one job. ``short`` makes the calibration's name of a layer of its name in the file.

    All that it decides is the same to the bit on any number of threads.
    """

    def __init__(
        self,
        device: torch.device,
        calibration: Calibration | None,
        rounding: str,
        short: Callable[[str], str] = str,
    ) -> None:
        if rounding not in CHOICES:
            raise CalibQuantError(f"unknown rounding {rounding!r}: use one of {', '.join(CHOICES)}")
        if rounding == "gptq" and calibration is None:
            raise OptionError("rounding gptq needs a calibration: give one, or use search or nearest")
        self._device, self._calibration, self._rounding, self._short = device, calibration, rounding, short
        self._room = Room(device)  # of the layer at hand
        self._factors: OrderedDict[tuple[str, int, bool, bool, torch.device], gptq.Factor | str] = OrderedDict()

    @_on_ladder
    @one_thread()
    def round(
        self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None = None
    ) -> Rounded:
        """Round ``[out, in]`` as the plan's entry and the job want it; CalibQuantError names ``where``.

        bias: float [out] of the layer, which may be corrected when the inputs are known.
        """
        task = self._task(layer, entry, weight, where, bias)
        if entry.rank:
            return self._split(task)
        if entry.rounding == "hswq" and self._rounding == AUTO:
            return self._hswq(task)
        if entry.pre_quant_scale:
            return self._smoothed(task)
        if weight.dim() != 2 or self._rounding == "nearest":
            return Rounded(self._nearest(task), "nearest")
        if task.inputs is None:
            return self._without_inputs(task)
        return self._best(task, self._shared_factor)

    @_on_ladder
    @one_thread()
    def trial(
        self,
        layer: str,
        entry: LayerPlan,
        weight: torch.Tensor,
        where: str,
        bias: torch.Tensor | None = None,
        branch: split.Branch | None = None,
    ) -> Trial:
        """What ``round`` would cost, measured on JUDGED_OUTPUTS of the outputs: a small part of its time.

        As for ``round``; entries with a rounding of their own or with ``pre_quant_scale`` cannot be tried. branch: of
        this layer, which is split off first.
        """
        task = self._task(layer, entry, weight, where, bias)
        task = task.without(branch) if branch else task
        factor: gptq.Factor | str = ""
        if task.inputs and self._rounding != "nearest":
            few = gptq.too_few(task.inputs.rows, gptq.MIN_ROWS)
            factor = few or self._shared_factor(task, not task.inputs.runs)
        tried = self._try(task, factor)
        name = self._plain_way(task) if task.inputs is None else tried.best
        decoded = tried.decoded[name.removesuffix(WITH_BIAS)]
        error = tried.loader if name == tried.best else tried.errors[name]
        return Trial(
            name,
            error,
            lambda rows: changes(task, tried, decoded, rows.float()),
            lambda rows: changes_of_inputs(task, rows.float()),
        )

    @_on_ladder
    @one_thread()
    def branch(self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str) -> split.Branch:
        """Of the planned rank, for a ``trial``: fitted to other runs than those that judge it."""
        task = self._task(layer, entry, weight, where, None)
        return self._branch(task, _inputs_for_branch(task).fitted)

    def _task(self, layer: str, entry: LayerPlan, weight: torch.Tensor, where: str, bias: torch.Tensor | None) -> Task:
        seen = self._calibration.layers.get(self._short(layer)) if self._calibration else None
        return Task(entry, weight, where, bias, self._inputs(seen) if seen else None)

    def _plain_way(self, task: Task) -> str:
        """The rounding of a layer whose inputs are not known."""
        if self._rounding == "nearest" or (self._rounding == AUTO and task.fmt.name not in SEARCH_PAYS):
            return "nearest"
        return "search"

    def _without_inputs(self, task: Task) -> Rounded:
        note = "" if self._calibration is None or self._rounding == "search" else "no GPTQ: not in the calibration"
        way = self._plain_way(task)
        return Rounded(self._pack(task, way, ""), way, note)

    def _best(self, task: Task, factor_of: _FactorOf) -> Rounded:
        """Of all ways that were asked for and are possible the one with the least output error, weights only.

        GPTQ is judged by what it makes of runs that it was not fitted to, if there are several. What goes into the file
        is then fitted to all of them: 6 % less error on other prompts with 45 runs, 12 % with 20 (demo model, NVFP4).
        """
        return self._finished(task, self._choose(task, factor_of))

    def _choose(self, task: Task, factor_of: _FactorOf) -> _Choice:
        assert task.inputs is not None
        runs, whole = task.inputs.runs, factor_of(task, True)
        fitted = factor_of(task, False) if runs and not isinstance(whole, str) else whole
        tried = self._try(task, fitted)
        note = _note(whole if isinstance(fitted, gptq.Factor) else fitted, tried.best, list(tried.packed)[-1])
        partial = len(tried.outputs) < len(task.weight) or (tried.chosen == "gptq" and runs)
        return _Choice(tried, whole, note, None if partial else tried.packed[tried.chosen])

    def _finished(self, task: Task, choice: _Choice) -> Rounded:
        """The whole layer by the rounding that was best on trial."""
        assert task.inputs is not None
        inputs, tried = task.inputs, choice.tried
        packed = choice.packed or self._pack(task, tried.chosen, choice.whole)
        bias = None
        if task.bias is not None and tried.best != tried.chosen:
            bias = corrected(task.bias, task.weight, task.decode(packed), inputs.stats.input_mean)
        if not len(inputs.rows):  # chosen by the error of the weights
            return Rounded(packed, tried.best, choice.note)
        return Rounded(packed, tried.best, choice.note, tried.errors, tried.loader, bias=bias, held_out=inputs.runs)

    def _how(self, task: Task) -> tuple[torch.Tensor, Format, torch.device, str]:
        return task.weight, task.fmt, self._room.device, task.where

    def _nearest(self, task: Task, scale: torch.Tensor | None = None) -> Packed:
        return nearest(*self._how(task), scale, self._room.parts)

    def _pack(self, task: Task, how: str, factor: gptq.Factor | str) -> Packed:
        if how == "nearest":
            return self._nearest(task)
        if how == "search":
            importance = task.importance() if task.inputs else None
            return searched(*self._how(task), importance, parts=self._room.parts)
        assert isinstance(factor, gptq.Factor)
        return by_gptq(*self._how(task), factor, parts=self._room.parts)

    def _try(self, task: Task, factor: gptq.Factor | str) -> Tried:
        """Every way that is asked for and possible, on JUDGED_OUTPUTS of the outputs: to the bit what the whole has."""
        fmt, outputs = task.fmt, judged_outputs(len(task.weight))
        part = task.part(outputs)
        how, parts = self._how(part), self._room.parts
        own = shared_scale(*self._how(task), parts=parts)
        packed = {"nearest": self._nearest(part, own)}
        if self._rounding != "nearest":
            importance = task.importance() if task.inputs else None
            scale = own if fmt.group else shared_scale(*self._how(task), importance, parts)
            packed["search"] = searched(*how, importance, scale, parts)
        if isinstance(factor, gptq.Factor):
            packed["gptq"] = by_gptq(*how, factor, own, parts)
        decoded = {name: part.decode(candidate) for name, candidate in packed.items()}
        return Tried(part, outputs, packed, decoded, *judge(part, decoded))

    def _split(self, task: Task) -> Rounded:
        """With a branch of the planned rank, or none where that is no better as the loader runs the layer.

        On trial the branch, too, is fitted to other runs than those that judge it.
        """
        inputs = _inputs_for_branch(task)
        plain = self._choose(task, self._shared_factor)
        branch = self._branch(task, inputs.fitted)
        rest = self._choose(task.without(branch), self._shared_factor)
        if not rest.tried.loader < plain.tried.loader:
            nothing = split.none(tuple(task.weight.shape), task.entry.rank)
            return replace(self._finished(task, plain), note="the branch was no better than none", branch=nothing)
        if inputs.runs:
            branch, rest = self._branch(task, inputs.rows), replace(rest, packed=None)
        done = self._finished(task.without(branch), rest)
        packed = replace(done.packed, energy=squared_norm(task.weight.float()))
        return replace(done, packed=packed, branch=branch, unsplit_error=plain.tried.loader)

    def _branch(self, task: Task, rows: torch.Tensor) -> split.Branch:
        rows = rows.float()
        fed = as_loaded(task.fmt, rows, task.entry)
        device = self._room.device
        return split.branch(task.weight.to(device), rows.to(device), fed.to(device), task.entry.rank)

    def _smoothed(self, task: Task) -> Rounded:
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
            importance = stretched.inputs.stats.input_sqmean
            packed = searched(*self._how(stretched), importance, parts=self._room.parts)
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

    def _hswq(self, task: Task) -> Rounded:
        if task.inputs is None:
            raise CalibQuantError(f"{task.where}: rounding hswq needs a calibration of this layer: give one")
        plain = self._nearest(task)  # raises the one error for NaN and Inf
        found = hswq.histogram(task.weight, task.inputs.stats.input_absmean)
        gains = asdict(hswq.gains(found))
        if task.fmt.config(tuple(task.weight.shape)) is None:
            return Rounded(plain, "nearest", gains=gains)
        amax = hswq.search(found)[0]
        scale = torch.tensor(amax / hswq.TOP if amax else 1.0)
        return Rounded(self._nearest(task, scale), "hswq", gains=gains)

    def _inputs(self, seen: LayerStats) -> Inputs:
        assert self._calibration is not None
        if seen.group not in self._calibration.rows:
            return Inputs(torch.empty(0, 0), seen, torch.empty(0, dtype=torch.bool), 0)
        return Inputs(self._calibration.rows[seen.group].rows, seen, *self._calibration.held_out(seen.group))

    def _factor(self, task: Task, everything: bool) -> gptq.Factor | str:
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
        mean = turn(mean.unsqueeze(0), size).squeeze(0).to(self._room.device)
        return gptq.factor(turn(rows.to(self._room.device), size), None if task.bias is None else mean, least)

    def _shared_factor(self, task: Task, everything: bool) -> gptq.Factor | str:
        """The same for all layers of a group; the most recent ones are kept, bounded in bytes."""
        assert task.inputs is not None
        key = task.inputs.stats.group, task.rotation, task.bias is not None, everything, self._room.device
        if key not in self._factors:
            self._factors[key] = self._factor(task, everything)
            while len(self._factors) > 1 and sum(map(_nbytes, self._factors.values())) > FACTOR_BYTES:
                self._factors.popitem(last=False)
        self._factors.move_to_end(key)
        return self._factors[key]

    def _forget_device(self) -> None:
        """Free what the GPU keeps for other layers."""
        self._factors = OrderedDict((key, kept) for key, kept in self._factors.items() if key[-1] == CPU)


def _nbytes(kept: gptq.Factor | str) -> int:
    return 0 if isinstance(kept, str) else kept.nbytes


def _inputs_for_branch(task: Task) -> Inputs:
    if task.inputs is None or not len(task.inputs.rows):
        raise CalibQuantError(f"{task.where}: a branch needs a calibration with rows of this layer: give one")
    refuse_damaged(task.weight, task.where)
    return task.inputs


def _note(factor: gptq.Factor | str, best: str, last: str) -> str:
    """What the user should know of a choice; last: the most elaborate rounding that was tried."""
    if factor and isinstance(factor, str):
        return f"no GPTQ: {factor}"
    if best.removesuffix(WITH_BIAS) != last:
        return f"{last} was no better than {best}"
    return factor.note if isinstance(factor, gptq.Factor) else ""


def _stretched(task: Task, scale: torch.Tensor) -> Task:
    """The same layer behind ``pre_quant_scale`` [in]: inputs times it, weight over it, activation scale to match."""
    assert task.inputs is not None
    entry, inputs = task.entry, task.inputs.scaled(scale)
    if entry.input_scale is not None:
        growth = float(inputs.stats.input_amax.max() / task.inputs.stats.input_amax.max())
        entry = replace(entry, input_scale=entry.input_scale * growth)
    return replace(task, entry=entry, weight=task.weight.float() / scale, inputs=inputs)
