"""What each layer would lose in each format as the loader runs it on a card, and in how many bytes.

With a calibration every option is tried with the rounding that the file will have, on inputs that GPTQ was not fitted
to; without one the probe's errors of the weights stand in. One layer is in memory at a time.

A split makes more options of one: "nvfp4+r16" has a branch of rank 16, tried like the rest, and its bytes are those of
both files. A fold is no option of a layer, for it is one with its neighbours' weights: it is chosen first, and the
table is measured on the folded model, rotated formats too, as they will be in the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibQuantError, OptionError
from ..evidence import sensitivity
from ..evidence.calibration import Calibration
from ..evidence.probe import Probe
from ..files.text import parse_json, read_text, write_text
from ..formats import SOURCE
from ..models import folding
from ..models.source import Source
from ..progress import Progress
from ..rounding.choice import SEARCH_PAYS, Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.split import WITHOUT, Branch
from ..rounding.trial import Trial
from . import folds, splitting
from .folding import folded
from .folds import Fold
from .layout import layer_specs
from .plan import Plan
from .recipes import legal, summary, with_input_scale
from .targets import GPUS, TARGETS, rounds_inputs, speed

FORMAT_VERSION = 2  # 1 counted the damage of rounded inputs whole
# What a layer may become, smallest first -> format, and whether weight-only.
OPTIONS: dict[str, tuple[str, bool]] = {
    "nvfp4": ("nvfp4", False),
    "nvfp4-w4a16": ("nvfp4", True),
    "w4a8": ("asym_w4a8_int8", False),
    "w6a8": ("asym_w6a8_int8", False),
    "fp8": ("float8_e4m3fn", False),
    "int8": ("int8_tensorwise", False),
    "int8-convrot": ("int8_convrot", False),
    "mxfp8": ("mxfp8", False),
    "bf16": (SOURCE, False),
}
RANK = "+r"  # between an option's name and the rank of its branch
RANKS = (0.5, 1, 2, 4)  # that a layer may choose from, times the wanted one
# The first of these that a layer may become decides whether its inputs are folded: the smallest. W4A8 goes before
# NVFP4, and says no: its rotated 8-bit inputs lose less than folded 4-bit ones, and a tenth more when folded.
DECIDES = ("w4a8", "nvfp4", "w6a8", "int8", "fp8", "mxfp8")
# Errors of rounded weights are much the same at every step and add up over a sampling run; those of rounded inputs are
# drawn anew and partly cancel. So much of the latter's damage to a prediction counts. Demo model, 12 steps, drawn /
# predicted without it, every layer in one format: weight-only NVFP4 1.5, FP8 1.6, W4A8 1.4, but INT8 .52, INT8 ConvRot
# .57, NVFP4 W4A4 .69. Were they wholly independent, .24 of it would count on these steps (with that, W4A4 2.4).
INPUTS_SHARE = 0.5
# Changes of a layer's outputs (input rows [n, in] -> [n, out]) -> the damage that they do to the model's prediction.
Damage = Callable[[str, Callable[[torch.Tensor], torch.Tensor]], float]


@dataclass(frozen=True)
class Cost:
    """One layer in one option.

    error: ||Y - Y'||^2 / ||Y||^2 of outputs as loaded, or of the weights where the table is guessed. nbytes: of the
    layer's tensors in the file, its branch in the other one included. speed: a word of ``targets.speed``. damage: what
    the gradient says of the error.
    """

    error: float
    nbytes: int
    speed: str
    damage: float | None = None


@dataclass(frozen=True)
class MadeWith:
    """All that a table depends on."""

    source: str  # fingerprint
    gpu: str
    options: tuple[str, ...]
    rounding: str
    input_scale: bool
    calibration: dict[str, Any] | None  # its summary; None: guessed
    fold: bool = False
    parts: str = ""  # of a checkpoint, as they were chosen


@dataclass(frozen=True)
class CostTable:
    """Layer -> option -> cost, of the layers that a plan may quantize, in the model with these folds."""

    made_with: MadeWith
    layers: dict[str, dict[str, Cost]] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return self.made_with.calibration is not None

    @property
    def options(self) -> list[str]:
        """Those that any layer has: what was asked for, and bf16 where nothing of that fits."""
        asked = dict.fromkeys((*self.made_with.options, "bf16"))
        return [name for name in asked if any(name in costs for costs in self.layers.values())]

    @property
    def has_damage(self) -> bool:
        return all(cost.damage is not None for costs in self.layers.values() for cost in costs.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load(path: str | os.PathLike[str], made_with: MadeWith) -> CostTable:
    """A table that was made with the same; CalibQuantError says what was different."""
    remedy = "remove it to have it made again, or give another name"
    raw = parse_json(read_text(path), f"{path}: is no cost table", remedy)
    try:
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {raw['format_version']}")
        found = MadeWith(**{**raw["made_with"], "options": tuple(raw["made_with"]["options"])})
        layers = {n: {o: _cost(cost) for o, cost in costs.items()} for n, costs in raw["layers"].items()}
        chosen = folds.parse(raw.get("folds"), str(path), remedy)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CalibQuantError(f"{path}: is no cost table of this tool ({e!r}): {remedy}") from e
    theirs, ours = asdict(found), asdict(made_with)
    if other := [name for name in ours if theirs[name] != ours[name]]:
        raise CalibQuantError(f"{path}: was made with another {', '.join(other)}: {remedy}")
    return CostTable(found, layers, chosen)


def _cost(raw: Mapping[str, Any]) -> Cost:
    cost = Cost(**raw)
    numbers = [cost.error, cost.nbytes, 0.0 if cost.damage is None else cost.damage]
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError(f"a cost of {raw}")
    return cost


def choose_options(names: str | None, gpu: str, comfyui: Path | None) -> tuple[str, ...]:
    """The options by name ("nvfp4,mxfp8"); else all that this ComfyUI (None: any that is supported) reads.

    Not W4A16, unless named: it is nearly always the least error for its bytes, and never fast.
    """
    if gpu not in GPUS:
        raise OptionError(f"gpu {gpu!r}: use one of {', '.join(GPUS)}")
    if names is not None:
        wanted = [name.strip() for name in names.split(",")]
        if unknown := [name for name in wanted if name not in OPTIONS]:
            raise OptionError(f"format {unknown[0]!r}: use some of {','.join(OPTIONS)}")
        return tuple(name for name in OPTIONS if name in wanted)
    return tuple(name for name, (_, weight_only) in OPTIONS.items() if not weight_only and _readable(name, comfyui))


def with_branches(options: tuple[str, ...], gpu: str, wanted: str) -> tuple[str, ...]:
    """The options, and after each that rounds its inputs on this card the same with branches about the wanted rank."""
    rank, share = splitting.amount(wanted)
    if share:
        raise OptionError(f"split {wanted}: the bytes follow from the size, bits or error: give a rank, such as 16")
    ranks = sorted({max(1, round(rank * times)) for times in RANKS})
    found = []
    for option in options:
        entry = layer_plan(option)
        able = entry.format not in WITHOUT and rounds_inputs(entry, gpu)
        found += [option, *(f"{option}{RANK}{rank}" for rank in ranks if able)]
    return tuple(found)


def option_of(entry: LayerPlan) -> str:
    """The name of what an entry of a plan is; its format where no option is that."""
    names = [name for name, (fmt, _) in OPTIONS.items() if fmt == entry.format]
    name = next((name for name in names if OPTIONS[name][1] == entry.full_precision), [*names, entry.format][0])
    return name + f"{RANK}{entry.rank}" * bool(entry.rank)


def layer_plan(option: str) -> LayerPlan:
    """What an option's name says, without a reason."""
    name, _, rank = option.partition(RANK)
    fmt, weight_only = OPTIONS[name]
    return LayerPlan(fmt, "", weight_only, rank=int(rank or 0))


def _readable(option: str, comfyui: Path | None) -> bool:
    target = TARGETS.get(OPTIONS[option][0])
    if target is None or not target.word:
        return True
    return comfyui is not None and not target.missing(comfyui)


def entries(
    source: Source, options: tuple[str, ...], calibration: Calibration | None = None
) -> dict[str, dict[str, LayerPlan]]:
    """Layer -> option -> the plan's entry, of every layer that may be quantized. calibration: for activation scales.

    A layer that no option fits stays in the source dtype.
    """
    found: dict[str, dict[str, LayerPlan]] = {}
    for name, info in source.layers.items():
        if info.protected or info.not_linear:
            continue
        found[name] = {}
        for option in options:
            wish = layer_plan(option)
            entry = legal(wish, info, source.shape(name))
            if entry.format == wish.format and 2 * wish.rank <= min(source.shape(name)):
                entry = entry if calibration is None else with_input_scale(source, name, entry, calibration)
                found[name][option] = entry
        found[name] = found[name] or {"bf16": LayerPlan(SOURCE, "")}
    return found


def made_with(
    source: Source,
    gpu: str,
    options: tuple[str, ...],
    rounding: str = "auto",
    input_scale: bool = True,
    calibration: Calibration | None = None,
    fold: bool = False,
) -> MadeWith:
    options = _as_run(source, options)
    seen = None
    if calibration is not None:
        seen = {**summary(calibration), "sensitivities": len(calibration.sensitivities)}
    parts = ",".join(source.kinds)
    return MadeWith(source.checkpoint.fingerprint(), gpu, options, rounding, input_scale, seen, fold, parts)


def _as_run(source: Source, options: tuple[str, ...]) -> tuple[str, ...]:
    """The options' true names: of a text encoder every format is weight-only, and no branch has inputs to serve."""
    if source.architecture.part != "te":
        return options
    plain = [option for option in options if RANK not in option]
    return tuple(dict.fromkeys("nvfp4-w4a16" if option == "nvfp4" else option for option in plain))


def measure(
    source: Source,
    calibration: Calibration,
    how: MadeWith,
    device: torch.device,
    progress: Progress | None = None,
) -> CostTable:
    """Every option of every layer, tried; with its damage where the calibration has the sensitivity of all of them.

    The calibration is the one that was collected, what the table folds is seen to here.
    """
    chosen = _folds(source, calibration, how, progress) if how.fold else {}
    damage = _damage(source, calibration, chosen)
    merge, calibration = folds.merge(source, chosen), folds.seen(source, chosen, calibration)
    rounder = Rounder(device, calibration, how.rounding, source.short)
    planned = entries(source, how.options, calibration if how.input_scale else None)
    measured: dict[str, dict[str, Cost]] = {}
    for i, name in enumerate(
        sorted(planned, key=lambda n: _group(source, calibration, n))
    ):  # GPTQ's factors are shared
        if progress:
            progress(i, len(planned), name)
        able = {
            option: entry
            for option, entry in planned[name].items()
            if not entry.rank
            or (_pays(source, name, entry) and splitting.may_have_branch(source, name, entry, calibration))
        }
        measured[name] = _measure_layer(source, name, able, rounder, how.gpu, damage, merge)
    return CostTable(how, {name: measured[name] for name in planned}, chosen)


def _folds(source: Source, calibration: Calibration, how: MadeWith, progress: Progress | None) -> dict[str, Fold]:
    """The folds that are best for the smallest format whose inputs this card rounds, layer by layer."""
    layers = dict.fromkeys(source.layers, LayerPlan(SOURCE, ""))
    for name, options in entries(source, how.options, calibration if how.input_scale else None).items():
        rounding = [o for o in DECIDES if o in options and rounds_inputs(options[o], how.gpu)]
        if rounding:
            layers[name] = options[rounding[0]]
    plan = Plan(source.architecture.name, "", source.name, layers)
    return folded(source, plan, calibration, progress).folds


def _damage(source: Source, calibration: Calibration, chosen: Mapping[str, Fold]) -> Damage | None:
    """By the gradients of the model that was calibrated: a folded layer's inputs and outputs are taken back to it."""
    known, factors = calibration.sensitivities, folds.factors(source, chosen)
    if not {source.short(name) for name in entries(source, ())} <= known.keys():
        return None
    inputs, outputs = folding.input_factors(source, factors), folding.output_factors(source, factors)

    def damage(layer: str, changes: Callable[[torch.Tensor], torch.Tensor]) -> float:
        fed, made = inputs.get(layer, 1.0), outputs.get(layer, 1.0)
        return sensitivity.damage(known[layer], lambda rows: changes(rows * fed) / made)

    return damage


def _group(source: Source, calibration: Calibration, layer: str) -> str:
    seen = calibration.layers.get(source.short(layer))
    return seen.group if seen else layer


def _measure_layer(
    source: Source,
    name: str,
    options: Mapping[str, LayerPlan],
    rounder: Rounder,
    gpu: str,
    damage: Damage | None,
    merge: folding.Merge,
) -> dict[str, Cost]:
    """A branch that is no better than none is no option: the file would have none either."""
    weight, where = folding.merged(source.load(name), f"{name}.weight", merge), f"{source.path}: layer {name}"
    bias, costs, widest = _bias(source, name, merge), dict[str, Cost](), dict[str, Branch]()
    for option, entry in options.items():
        nbytes, kind = stored_bytes(source, name, entry), speed(entry, gpu)
        if entry.format == SOURCE:
            costs[option] = Cost(0.0, nbytes, kind, None if damage is None else 0.0)
            continue
        base, branch = option.partition(RANK)[0], None
        as_run = replace(entry, full_precision=not rounds_inputs(entry, gpu))
        if entry.rank:
            if base not in widest:
                rank = max(e.rank for e in options.values())
                widest[base] = rounder.branch(name, replace(as_run, rank=rank), weight, where)
            branch = widest[base].first(entry.rank)
            if branch.rank < entry.rank:  # fewer rows than that
                continue
        tried = rounder.trial(name, as_run, weight, where, bias, branch)
        if branch and not tried.error < costs[base].error:
            continue
        harm = None if damage is None else _harm(damage, source.short(name), tried)
        costs[option] = Cost(tried.error, nbytes, kind, harm)
    return costs


def _pays(source: Source, name: str, entry: LayerPlan) -> bool:
    """Whether the layer with its branch is smaller than in 16 bit."""
    return stored_bytes(source, name, entry) < stored_bytes(source, name, LayerPlan(SOURCE, ""))


def stored_bytes(source: Source, name: str, entry: LayerPlan) -> int:
    """Bytes of the layer's tensors, its branch in the other file included."""
    branch = entry.rank * splitting.rank_bytes(source.shape(name)) if entry.rank else 0
    return sum(spec.nbytes for spec in layer_specs(source, name, entry)) + branch


def _bias(source: Source, name: str, merge: folding.Merge) -> torch.Tensor | None:
    key = f"{name}.bias"
    if key not in source.checkpoint.entries:
        return None
    bias = source.checkpoint.read(key)
    return folding.merged(bias, key, merge).to(bias.dtype)


def _harm(damage: Damage, layer: str, tried: Trial) -> float:
    whole = damage(layer, tried.changes)
    return whole - (1 - INPUTS_SHARE) * min(whole, damage(layer, tried.of_inputs))


def guess(source: Source, probed: Probe, how: MadeWith) -> CostTable:
    """From weights alone: what the rounding of inputs costs is not in it."""
    errors = {layer.name: layer.errors for layer in probed.layers}
    layers = {}
    for name, options in entries(source, how.options).items():
        layers[name] = {
            option: Cost(
                _guessed(errors[name], entry.format, how.rounding),
                stored_bytes(source, name, entry),
                speed(entry, how.gpu),
            )
            for option, entry in options.items()
        }
    return CostTable(how, layers)


def _guessed(errors: Mapping[str, tuple[float, float]], fmt: str, rounding: str) -> float:
    if fmt == SOURCE:
        return 0.0
    searched = rounding == "search" or (rounding != "nearest" and fmt in SEARCH_PAYS)
    return errors[fmt][searched]
