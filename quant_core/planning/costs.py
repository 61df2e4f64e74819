"""What each layer would lose in each format as the loader runs it on a card, and in how many bytes.

With a calibration every option is tried with the rounding that the file will have, on inputs that GPTQ was not fitted
to; without one the probe's errors of the weights stand in. One layer is in memory at a time.
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
from ..models.source import Source
from ..progress import Progress
from ..rounding.choice import SEARCH_PAYS, Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.trial import Trial
from .layout import layer_specs
from .recipes import legal, summary, with_input_scale
from .targets import GPUS, TARGETS, rounds_inputs, speed

FORMAT_VERSION = 1
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
    layer's tensors in the file. speed: a word of ``targets.speed``. damage: what the gradient says of the error.
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


@dataclass(frozen=True)
class CostTable:
    """Layer -> option -> cost, of the layers that a plan may quantize."""

    made_with: MadeWith
    layers: dict[str, dict[str, Cost]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return self.made_with.calibration is not None

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
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CalibQuantError(f"{path}: is no cost table of this tool ({e!r}): {remedy}") from e
    theirs, ours = asdict(found), asdict(made_with)
    if other := [name for name in ours if theirs[name] != ours[name]]:
        raise CalibQuantError(f"{path}: was made with another {', '.join(other)}: {remedy}")
    return CostTable(found, layers)


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
            fmt, full_precision = OPTIONS[option]
            entry = legal(LayerPlan(fmt, "", full_precision), info, source.shape(name))
            if entry.format == fmt:
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
) -> MadeWith:
    seen = None
    if calibration is not None:
        seen = {**summary(calibration), "sensitivities": len(calibration.sensitivities)}
    return MadeWith(source.checkpoint.fingerprint(), gpu, options, rounding, input_scale, seen)


def measure(
    source: Source,
    calibration: Calibration,
    how: MadeWith,
    device: torch.device,
    progress: Progress | None = None,
) -> CostTable:
    """Every option of every layer, tried; with its damage where the calibration has the sensitivity of all of them."""
    rounder = Rounder(device, calibration, how.rounding, source.prefix)
    planned = entries(source, how.options, calibration if how.input_scale else None)
    damage = _damage(calibration, {name.removeprefix(source.prefix) for name in planned})
    measured: dict[str, dict[str, Cost]] = {}
    for i, name in enumerate(
        sorted(planned, key=lambda n: _group(source, calibration, n))
    ):  # GPTQ's factors are shared
        if progress:
            progress(i, len(planned), name)
        measured[name] = _measure_layer(source, name, planned[name], rounder, how.gpu, damage)
    return CostTable(how, {name: measured[name] for name in planned})


def _damage(calibration: Calibration, layers: set[str]) -> Damage | None:
    known = calibration.sensitivities
    return (lambda layer, changes: sensitivity.damage(known[layer], changes)) if layers <= known.keys() else None


def _group(source: Source, calibration: Calibration, layer: str) -> str:
    seen = calibration.layers.get(layer.removeprefix(source.prefix))
    return seen.group if seen else layer


def _measure_layer(
    source: Source,
    name: str,
    options: Mapping[str, LayerPlan],
    rounder: Rounder,
    gpu: str,
    damage: Damage | None,
) -> dict[str, Cost]:
    weight, where, key = source.load(name), f"{source.path}: layer {name}", f"{name}.bias"
    bias = source.checkpoint.read(key) if key in source.checkpoint.entries else None
    costs = {}
    for option, entry in options.items():
        nbytes, kind = sum(spec.nbytes for spec in layer_specs(source, name, entry)), speed(entry, gpu)
        if entry.format == SOURCE:
            costs[option] = Cost(0.0, nbytes, kind, None if damage is None else 0.0)
            continue
        as_run = replace(entry, full_precision=not rounds_inputs(entry, gpu))
        tried = rounder.trial(name, as_run, weight, where, bias)
        harm = None if damage is None else _harm(damage, name.removeprefix(source.prefix), tried)
        costs[option] = Cost(tried.error, nbytes, kind, harm)
    return costs


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
                sum(spec.nbytes for spec in layer_specs(source, name, entry)),
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
