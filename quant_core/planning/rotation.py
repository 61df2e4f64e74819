"""Which INT8 layers are rotated: those that lose less by it as the loader runs them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from ..errors import OptionError
from ..evidence.calibration import Calibration
from ..formats import FORMATS
from ..models.folding import Merge, merged
from ..models.source import Source
from ..progress import Progress
from ..rounding.judge import Judge, as_loaded
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import nearest
from . import folds
from .plan import Plan
from .recipes import sized

PLAIN, ROTATED = "int8_tensorwise", "int8_convrot"
CHOICES = ("never", "auto", "always")


def rotated(
    source: Source,
    plan: Plan,
    rotate: str = "auto",
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    but: Collection[str] = (),
) -> Plan:
    """The plan with INT8 layers rotated: ``always`` where the width divides, ``auto`` where that measures better.

    Measured is nearest rounding, weights and inputs together, on the calibration's rows; without rows the weights
    alone. Reads every INT8 layer once, those in ``but`` excepted, which stay as they are. The file keeps its size but
    for a few bytes of markers.
    """
    if rotate not in CHOICES:
        raise OptionError(f"rotate {rotate!r}: use one of {', '.join(CHOICES)}")
    free = {name: entry for name, entry in plan.layers.items() if name not in but}
    wanted = [name for name, entry in free.items() if entry.format == PLAIN and _divides(source, name)]
    if rotate == "never" or not wanted:
        return plan
    layers, merge = dict(plan.layers), folds.merge(source, plan.folds)
    seen = calibration and folds.seen(source, plan.folds, calibration)
    for i, name in enumerate(wanted):
        if progress:
            progress(i, len(wanted), name)
        entry = layers[name]
        if rotate == "always":
            layers[name] = replace(entry, format=ROTATED, reason=f"{entry.reason}; rotated")
        else:
            layers[name] = _better(source, name, entry, seen, merge)
    return sized(source, replace(plan, layers=layers))


def _divides(source: Source, layer: str) -> bool:
    return not FORMATS[ROTATED].obstacle(source.shape(layer))


def _better(source: Source, layer: str, entry: LayerPlan, calibration: Calibration | None, merge: Merge) -> LayerPlan:
    name = source.short(layer)
    known = calibration is not None and name in calibration.layers
    group = calibration.layers[name].group if calibration and known else ""
    rows = calibration.rows_of(name) if calibration and group in calibration.rows else torch.empty(0, 0)
    weight = merged(source.load(layer), f"{layer}.weight", merge)
    where = f"{source.path}: layer {layer}"
    judge, errors = Judge(weight, rows), {}
    for choice in (PLAIN, ROTATED):
        fmt, tried = FORMATS[choice], replace(entry, format=choice)
        decoded = fmt.decode(nearest(weight, fmt, torch.device("cpu"), where).tensors, tuple(weight.shape))
        errors[choice] = judge.error(decoded, rows=as_loaded(fmt, judge.rows, tried))
    of = "outputs as loaded" if judge.measures_outputs else "weights"
    best = min(errors, key=lambda choice: errors[choice])  # of equals the plain one
    reason = f"{entry.reason}; error of {of} {errors[PLAIN]:.2e}, rotated {errors[ROTATED]:.2e}"
    return replace(entry, format=best, reason=reason)
