"""How much rank each layer's branch gets under one total.

A rank is worth the share that it takes off the layer's own error of inputs. Final latent as loaded against GPTQ without
a split, demo model, NVFP4, n = 40, mean rank 4 / 16: this .56 / .28; the same rank for all .67 / .29; by share per byte
.74 / .38; by the relative error of the layer's output .69 / .31, that per byte .74 / .45, though it has the least mean
error of layers: loud errors are not those that pictures show.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import OptionError
from ..evidence.calibration import Calibration
from ..files.text import counted, gigabytes
from ..formats import FORMATS
from ..models import folding, lora
from ..models.folding import Merge
from ..models.source import Source
from ..progress import Progress
from ..rounding import smoothing
from ..rounding.judge import as_loaded
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import pick_device, refuse_damaged
from ..rounding.room import Room, in_room
from ..rounding.split import WITHOUT, spectrum
from . import folds
from .layout import branch_size
from .plan import Plan
from .recipes import sized

HELP = "a 16-bit branch for the error of 4- and 8-bit inputs: its mean rank (16), or its share of the file (6%%)"


def amount(text: str) -> tuple[float, float]:
    """ "16" -> (16, 0), a mean rank; "6%" -> (0, .06), a share of the main file. OptionError for anything else."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise OptionError(f"split {text!r}: give a rank above 0, such as 16, or a share of the file, such as 6%")
    return (0.0, value / 100) if text.strip().endswith("%") else (value, 0.0)


def split(
    source: Source,
    plan: Plan,
    calibration: Calibration,
    wanted: str,
    progress: Progress | None = None,
    device: str = "auto",
) -> Plan:
    """The plan with a rank for the branch of every layer that gains by one, ``wanted`` (``amount``) in all.

    Layers whose inputs are not quantized or were not sampled get none, nor does INT8. Reads every other layer once.
    The calibration is the one that was collected, what the plan folds is seen to here. Raises OptionError where no
    layer gets a rank.
    """
    rank, share = amount(wanted)
    merge, calibration = folds.merge(source, plan.folds), folds.seen(source, plan.folds, calibration)
    if any(entry.pre_quant_scale for entry in plan.layers.values()):
        raise OptionError(f"a split and {smoothing.KEY} do not go together: leave one of them off")
    able = [layer for layer, entry in plan.layers.items() if may_have_branch(source, layer, entry, calibration)]
    gains, where = {}, pick_device(device)
    for i, layer in enumerate(able):
        if progress:
            progress(i, len(able), layer)
        gains[layer] = _gains(source, layer, plan.layers[layer], calibration, merge, where)
    costs = {layer: rank_bytes(source.shape(layer)) for layer in able}
    total = share * sized(source, plan).size if share else rank * sum(costs.values())
    ranks = ranked(gains, costs, int(total))
    if not any(ranks.values()):
        why = (
            "none has sampled inputs that are rounded, INT8 layers aside"
            if not able
            else "it is too little for one rank"
        )
        raise OptionError(f"split {wanted}: no layer of {source.path} gets a branch: {why}")
    layers = {layer: _with_branch(entry, ranks.get(layer, 0)) for layer, entry in plan.layers.items()}
    return sized(source, replace(plan, layers=layers))


def summary(source: Source, plan: Plan) -> list[str]:
    """What a plan splits off, for whoever made it; [] for nothing."""
    layers, branch = counted(len(plan.ranks()), "layer"), branch_size(source, plan)
    return [f"split: {layers}, {gigabytes(branch)} more in a LoRA of their own ({branch} bytes)"] if branch else []


def rank_bytes(shape: tuple[int, ...]) -> int:
    """Of one rank of a layer [out, in] in the branch's file."""
    return sum(shape) * lora.DTYPE.itemsize


def ranked(gains: dict[str, torch.Tensor], costs: dict[str, int], total: int) -> dict[str, int]:
    """Layer -> rank: of the gains (falling, per layer) the largest, as many as ``total`` bytes pay for.

    It stops at the first that does not fit, so that a larger total never takes rank from a layer.
    """
    steps = [(float(gain), layer) for layer, falling in gains.items() for gain in falling if gain > 0]
    ranks, spent = dict.fromkeys(gains, 0), 0
    for _, layer in sorted(steps, key=lambda step: -step[0]):
        spent += costs[layer]
        if spent > total:
            break
        ranks[layer] += 1
    return ranks


def may_have_branch(source: Source, layer: str, entry: LayerPlan, calibration: Calibration) -> bool:
    seen = calibration.layers.get(source.short(layer))
    quantized = (
        entry.format in FORMATS
        and entry.format not in WITHOUT
        and not entry.full_precision
        and entry.rounding != "hswq"
    )
    return quantized and seen is not None and len(source.shape(layer)) == 2 and seen.group in calibration.rows


def _gains(
    source: Source, layer: str, entry: LayerPlan, calibration: Calibration, merge: Merge, device: torch.device
) -> torch.Tensor:
    """What each rank of this layer takes off, up to half of what there is."""
    weight = folding.merged(source.load(layer), f"{layer}.weight", merge)
    refuse_damaged(weight, f"{source.path}: layer {layer}")
    rows = calibration.rows_of(source.short(layer)).float()
    fed = as_loaded(FORMATS[entry.format], rows, entry)

    def on(room: Room) -> torch.Tensor:
        return spectrum(*(tensor.to(room.device) for tensor in (weight, rows, fed))).cpu()

    found, _ = in_room(device, on)
    return found[: max(1, min(len(found), weight.shape[1]) // 2)]


def _with_branch(entry: LayerPlan, rank: int) -> LayerPlan:
    return replace(entry, rank=rank, reason=f"{entry.reason}; branch of rank {rank}") if rank else entry
