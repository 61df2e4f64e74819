"""Which factors are folded: for each group of channels those that lose least as the loader runs its layers.

A channel is divided by rms(x)**a / rms(w)**b, as SmoothQuant does (Xiao et al., arXiv 2211.10438) with one number
more; w are the columns of all layers that see it. (a, b) is chosen on one part of the calibration's runs and judged on
the others: where they do not lose less, the group stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..evidence.calibration import Calibration
from ..formats import FORMATS, SOURCE
from ..models import folding
from ..models.folding import Group, Part
from ..models.source import Source
from ..progress import Progress
from ..rounding.judge import Judge, as_loaded
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import refuse_damaged, searched
from ..rounding.trial import judged_outputs
from .folds import LIMIT, Fold, packed
from .plan import Plan
from .recipes import calibrated, sized

POWERS = [(a, b) for a in (0.25, 0.5, 0.75) for b in (0.0, 0.25, 0.5, 0.75)]
ROWS = 128  # of inputs that a layer is measured on
GPTQ_SHARE = 0.5  # of the error that weights have with searched scales: how much of it counts; GPTQ leaves less
# A modulation makes (1 + scale) / s - 1, in bfloat16: near -1 for a large s, where it is rounded by up to 2**-9.
MODULATION_ROUNDING = 2.0**-9


@dataclass(frozen=True)
class Seen:
    """One layer of a group: its weight float32 [out, in], its plan, max|x| float32 [in], rows [n, in] of inputs to
    fit on and to judge by.
    """

    part: Part
    weight: torch.Tensor
    entry: LayerPlan
    amax: torch.Tensor
    fitted: torch.Tensor
    judged: torch.Tensor


def folded(source: Source, plan: Plan, calibration: Calibration, progress: Progress | None = None) -> Plan:
    """The plan with folds for all groups that have quantized layers whose inputs were sampled.

    Of the calibration as it was collected. Activation scales of the plan are made anew, for the folded model.
    """
    groups, folds = folding.groups(source), {}
    for i, (name, group) in enumerate(groups.items()):
        if progress:
            progress(i, len(groups), name)
        quantized = [part for part in group.consumers if plan.layers[part.module].format != SOURCE]
        layers = [_look(source, plan, calibration, part) for part in quantized]
        if layers and None not in layers:
            folds[name] = choose(group, [one for one in layers if one])
    plan = replace(plan, folds=folds)
    scaled = any(entry.input_scale is not None for entry in plan.layers.values())
    return calibrated(source, plan, calibration) if scaled else sized(source, plan)


def choose(group: Group, layers: Sequence[Seen]) -> Fold:
    """The best of the grid on the rows to fit on; none where the other rows do not lose less by it."""
    loud, weights = _loudness(group, layers)
    tried = {(a, b): exponents(loud, weights, a, b) for a, b in POWERS}
    errors = {powers: _error(group, layers, torch.exp2(e), "fitted") for powers, e in tried.items()}
    best = min(errors, key=lambda powers: errors[powers])
    before = _error(group, layers, torch.ones(group.width), "judged")
    after = _error(group, layers, torch.exp2(tried[best]), "judged")
    if not after < before:
        return Fold(0.0, 0.0, before, before)
    return Fold(*best, before, after, packed(tried[best]))


def exponents(loud: torch.Tensor, weights: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """float32 [width], whole numbers: log2 of loud**a / weights**b with a mean of 0, rounded."""
    wanted = a * loud.log2() - b * weights.log2()
    return (wanted - wanted.mean()).round().clamp(-LIMIT, LIMIT)


def _look(source: Source, plan: Plan, calibration: Calibration, part: Part) -> Seen | None:
    """What is known of a quantized layer; None where nothing is gained, or nothing was sampled.

    Exact inputs gain nothing, and rotated ones lose: by this measure W4A8 with GPTQ got 10 % worse on demo layers.
    """
    entry, stats = plan.layers[part.module], calibration.layers.get(source.short(part.module))
    if stats is None or stats.group not in calibration.rows:
        return None
    if entry.full_precision or FORMATS[entry.format].rotation(source.shape(part.module)[1]):
        return None
    rows = calibration.rows[stats.group].rows
    held_out, runs = calibration.held_out(stats.group)
    fitted, judged = (rows[~held_out], rows[held_out]) if runs else (rows, rows)
    if not len(fitted) or not len(judged):
        return None
    weight = source.load(part.module).float()
    refuse_damaged(weight, f"{source.path}: layer {part.module}")
    return Seen(part, weight, entry, stats.input_amax, fitted, judged)


def _loudness(group: Group, layers: Sequence[Seen]) -> tuple[torch.Tensor, torch.Tensor]:
    """rms of inputs and of weight columns for each channel, float32 [width], every layer counting the same."""

    def rms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        squares = [
            tensor.double().square().mean(0)[one.part.start : one.part.stop]
            for one, tensor in zip(layers, tensors, strict=True)
        ]
        mean = group.gathered(sum(s / s.mean().clamp(min=1e-300) for s in squares))
        return mean.sqrt().clamp(min=float(mean.sqrt().max()) * 2.0**-LIMIT or 1.0).float()

    return rms([one.fitted for one in layers]), rms([one.weight for one in layers])


def _error(group: Group, layers: Sequence[Seen], s: torch.Tensor, which: str) -> float:
    """Mean relative error of the layers' outputs as loaded, their inputs divided by s and their columns times s."""
    return sum(_layer_error(group, one, s, getattr(one, which)) for one in layers) / len(layers)


def _layer_error(group: Group, one: Seen, s: torch.Tensor, rows: torch.Tensor) -> float:
    """What the inputs' rounding costs with exact weights, plus what GPTQ's of the weights will.

    On demo layers the sum ranks (a, b) much as the error as loaded with GPTQ: Spearman .85 for NVFP4, .79 for INT8;
    inputs alone .80 and .38.
    """
    fmt = FORMATS[one.entry.format]
    weight = one.weight[judged_outputs(len(one.weight))]
    along = group.along(one.part, s, weight.shape[1])
    judge = Judge(weight, rows, ROWS)
    smooth, weight, entry = judge.rows / along, weight * along, one.entry
    if entry.input_scale is not None:
        growth = float((one.amax / along).max() / one.amax.max())
        entry = replace(entry, input_scale=entry.input_scale * growth)
    found = searched(weight, fmt, torch.device("cpu"), one.part.module, smooth.square().mean(0))
    if any(producer.plus_one for producer in group.producers):
        noise = torch.rand(smooth.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        smooth = smooth * (1 + MODULATION_ROUNDING * along.clamp(min=1) * noise)
    inputs = judge.error(weight, rows=as_loaded(fmt, smooth, entry))
    return inputs + GPTQ_SHARE * judge.error(fmt.decode(found.tensors, tuple(weight.shape)), rows=smooth)
