"""Recipes: named rule sets that make a plan, convert_to_quant's options among them.

A recipe says what is *wanted* for each layer; :func:`legal` then says what is *possible* (protected layers, layers
whose shape ComfyUI reads to detect the model, shapes that do not divide) and writes the reason into the plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration
from ..evidence.probe import Probe
from ..formats import FORMATS, SOURCE, changes_shape, title
from ..models.architectures import LayerInfo
from ..models.source import Source
from ..rounding import smoothing
from ..rounding.layerplan import LayerPlan
from . import convert_to_quant, folds, scoring
from .layout import predicted_size
from .plan import LEAST_SCALE, Plan
from .scoring import ScoreOptions

# What a layer falls back to when its shape does not fit: 8 bit first, 16 bit last.
FALLBACK = {
    "nvfp4": "mxfp8",
    "mxfp8": "float8_e4m3fn",
    "asym_w4a8_int8": "int8_tensorwise",
    "asym_w6a8_int8": "int8_tensorwise",
    "int8_convrot": "int8_tensorwise",
}
# FP8 without a calibrated input_scale would quantize activations at scale 1.0 (56 % error at x ~ 1e-3).
WEIGHT_ONLY = {"float8_e4m3fn": "weights only (w8a16): no calibrated input_scale"}


# What an input_scale of 1 stands for: the largest value of the activation's format.
ACTIVATION_MAX = {"float8_e4m3fn": 448.0, "nvfp4": 2688.0}
# Other prompts and seeds reach 1.7 times the largest input that a calibration saw; what lies above the scale's reach is
# cut off. Room above costs nothing, because E4M3 is a floating-point grid: on the demo model's held-out inputs the
# error of FP8 activations is 14.6e-4 with a factor of 1, 7.1e-4 with 2 to 64; of NVFP4 94e-4 and 87e-4.
HEADROOM = 4.0


@dataclass(frozen=True)
class Rule:
    """First match wins. The pattern is *searched* in ``<layer>.weight``, as convert_to_quant does."""

    pattern: str
    format: str
    reason: str


@dataclass(frozen=True)
class Recipe:
    """``base`` for every layer that no rule matches. ``architectures`` limits a recipe to the families it is for."""

    name: str
    title: str
    base: str
    rules: tuple[Rule, ...] = ()
    architectures: tuple[str, ...] = ()
    convolutions: bool = False
    warning: str = ""


_ZIMAGE_KEPT = (
    Rule(
        r"^(?:model\.diffusion_model\.)?layers\.29\.attention\.qkv\.",
        SOURCE,
        "last attention: only the final layer follows",
    ),
    Rule(r"layers\.(?:2[2-9])\.adaLN_modulation\.0\.", SOURCE, "late modulation sets scale and shift"),
    Rule(
        r"context_refiner\.[01]\.attention\.out\.|context_refiner\.1\.feed_forward\.w2\.|"
        r"noise_refiner\.1\.(?:attention\.(?:qkv|out)|feed_forward\.w2)\.|noise_refiner\.[01]\.feed_forward\.w3\.",
        SOURCE,
        "a refiner has two blocks only",
    ),
)


_ZIMAGE_8BIT = (
    Rule(r"^(?:model\.diffusion_model\.)?layers\.(?:10|16|26|27|28)\.attention\.qkv\.", "mxfp8", "sensitive attention"),
    Rule(
        r"^(?:model\.diffusion_model\.)?layers\.(?:0|1|3|6|9|1[1-4]|19|20|2[6-9])\.attention\.out\.",
        "mxfp8",
        "sensitive attention output",
    ),
    Rule(r"^(?:model\.diffusion_model\.)?layers\.(?:[3-9]|[12]\d)\.feed_forward\.w1\.", "mxfp8", "w1 is the gate"),
    Rule(r"layers\.(?:1[6-9]|2[01])\.adaLN_modulation\.0\.", "mxfp8", "middle modulation"),
    Rule(
        r"context_refiner\.[01]\.(?:attention\.qkv|feed_forward\.w[123])\.|"
        r"noise_refiner\.0\.(?:attention\.(?:qkv|out)|feed_forward\.w[12])\.|noise_refiner\.1\.feed_forward\.w1\.",
        "mxfp8",
        "a refiner has two blocks only",
    ),
)

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("nvfp4", "Every layer NVFP4 where it fits", "nvfp4"),
        Recipe("mxfp8", "Every layer MXFP8 where it fits", "mxfp8"),
        Recipe("fp8", "Every layer FP8 with a scale", "float8_e4m3fn"),
        Recipe("int8", "Every layer INT8 per row, rotated where that measures better", "int8_tensorwise"),
        Recipe("w4a8", "Every layer W4A8 where it fits", "asym_w4a8_int8"),
        Recipe("w6a8", "Every layer W6A8 where it fits", "asym_w6a8_int8"),
        Recipe(
            "fp8-unscaled",
            "Plain FP8 cast that any FP8 loader reads, Conv weights included",
            "float8_e4m3fn_unscaled",
            convolutions=True,
            warning="a plain cast is too coarse for small weights: to nearest it costs 1.6x (sigma .02) to 18x (sigma "
            ".005) the error of FP8 with a scale, with GPTQ 1x (sigma .045) to 24x (sigma .005): prefer recipe fp8 "
            "wherever ComfyUI loads the file",
        ),
        # facts/seeds.md E: the two published Z-Image Turbo recipes. In the first the 8-bit list has priority.
        Recipe(
            "zimage-nvfp4-mixed",
            "Z-Image: NVFP4 with MXFP8 and BF16 where it hurts",
            "nvfp4",
            _ZIMAGE_8BIT + _ZIMAGE_KEPT,
            ("zimage",),
        ),
        Recipe(
            "zimage-mxfp8-uniform",
            "Z-Image: MXFP8, the same layers kept",
            "mxfp8",
            _ZIMAGE_KEPT,
            ("zimage",),
        ),
    )
}


def make_plan(source: Source, recipe: Recipe | str) -> Plan:
    """The plan of a recipe (or its name) for a source, with its exact size."""
    recipe = by_recipe_name(recipe) if isinstance(recipe, str) else recipe
    if recipe.architectures and source.architecture.name not in recipe.architectures:
        raise CalibQuantError(
            f"{source.path}: recipe {recipe.name} is for {', '.join(recipe.architectures)}, this file is "
            f"{source.architecture.name}: use nvfp4, mxfp8, fp8 or int8"
        )
    rules = _compile(recipe.rules)
    layers = {}
    for layer, info in source.layers.items():
        wanted = next((r for pattern, r in rules if pattern.search(layer + ".weight")), None)
        wish = LayerPlan(wanted.format, wanted.reason) if wanted else LayerPlan(recipe.base, f"recipe {recipe.name}")
        layers[layer] = legal(wish, info, source.shape(layer), explicit=wanted is not None)
    if recipe.convolutions:
        in_blocks = (c for c in source.convolutions if source.architecture.describe(c).block is not None)
        layers |= {c: LayerPlan(recipe.base, f"recipe {recipe.name}, Conv weight") for c in in_blocks}
    return sized(source, Plan(source.architecture.name, recipe.name, source.name, layers))


def unmatched(source: Source, recipe: Recipe) -> list[str]:
    """What to say of a user's own patterns that match no layer of the source: misspelt, or of another model."""
    keys = [layer + ".weight" for layer in source.layers]
    rules = [] if recipe.name in RECIPES else _compile(recipe.rules)
    return [
        f"the pattern {rule.pattern!r} ({rule.reason}) matches no layer of this model"
        for pattern, rule in rules
        if not any(map(pattern.search, keys))
    ]


def sized(source: Source, plan: Plan) -> Plan:
    """The plan with the exact size of the file it makes."""
    plan = replace(plan, parts=source.kinds)
    return replace(plan, size=predicted_size(source, plan))


def by_score(source: Source, probed: Probe, options: ScoreOptions | None = None) -> Plan:
    """quant_probe's three-way decision as a plan: KEEP stays, FP8, NVFP4 (see ``scoring``)."""
    scored = scoring.decide(probed, options)
    return _plan_of(
        source,
        "percentiles",
        {
            d.layer.name: LayerPlan(scoring.FORMAT_OF[d.decision], f"score {d.score:.3f}: {d.decision} ({d.reason})")
            for d in scored.decisions
        },
    )


def keep_worst(source: Source, probed: Probe, ratio: float, base: str = "nvfp4") -> Plan:
    """The share ``ratio`` of the layers with the largest measured error in ``base`` stays; the rest is ``base``."""
    chosen = scoring.keep_worst(probed, ratio, base)
    error = {layer.name: layer.errors[base][0] for layer in probed.layers}
    wishes = {name: LayerPlan(fmt, f"error {error[name]:.2e} in {title(base)}") for name, fmt in chosen.items()}
    return _plan_of(source, f"keep-ratio {ratio:g}", wishes)


def hswq(source: Source, calibration: Calibration, ratio: float = 0.25, scaled: bool = True) -> Plan:
    """HSWQ: the share ``ratio`` of layers with the largest output variance stays, the rest is FP8.

    scaled: V2, with a searched scale in the native dialect; else V1, a plain cast (Linear layers only).
    """
    scoring.check_ratio(ratio)
    candidates = {n: i for n, i in source.layers.items() if not i.protected}
    stats = {n: calibration.layers.get(source.short(n)) for n in candidates}
    missing = [n for n, seen in stats.items() if seen is None]
    if missing:
        raise CalibQuantError(f"{source.path}: layer {missing[0]} is not in the calibration: calibrate this model")
    ranked = sorted(stats, key=lambda n: (-stats[n].output_variance, n))
    kept = set(ranked[: int(len(ranked) * ratio)])
    fmt = "float8_e4m3fn" if scaled else "float8_e4m3fn_unscaled"
    wishes = {
        n: LayerPlan(
            SOURCE if n in kept else fmt,
            f"output variance {stats[n].output_variance:.3g}, rank {i + 1} of {len(ranked)}",
            rounding="" if n in kept else "hswq",
        )
        for i, n in enumerate(ranked)
    }
    plan = _plan_of(source, "hswq" if scaled else "hswq-v1", wishes)
    return sized(source, replace(plan, calibration=summary(calibration)))


def calibrated(source: Source, plan: Plan, calibration: Calibration) -> Plan:
    """The plan with an ``input_scale`` for every FP8 and NVFP4 layer: room for HEADROOM times the largest activation.

    Never a percentile: clipping activations costs more than the finer grid gains (facts/peers.md §3.3). FP8 layers
    that ran weight-only for want of a scale are freed to run W8A8.
    """
    calibration = folds.seen(source, plan.folds, calibration)
    layers = {name: with_input_scale(source, name, entry, calibration) for name, entry in plan.layers.items()}
    return sized(source, replace(plan, layers=layers, calibration=summary(calibration)))


def with_input_scale(source: Source, name: str, entry: LayerPlan, calibration: Calibration) -> LayerPlan:
    """One layer's entry as in ``calibrated``; weight-only where that was wanted for itself (W4A16) stays so."""
    seen = calibration.layers.get(source.short(name))
    amax = float(seen.input_amax.max()) if seen else 0.0
    if not math.isfinite(amax):
        raise CalibQuantError(f"{source.path}: layer {name}: the calibration has {amax} in input_amax: calibrate again")
    note = WEIGHT_ONLY.get(entry.format, "")
    info = source.layers.get(name)  # None: a convolution
    wanted = (info and info.weight_only) or not note
    if entry.format not in ACTIVATION_MAX or amax <= 0 or (entry.full_precision and wanted):
        return entry
    reason = entry.reason.removesuffix(f"; {note}") if note else entry.reason
    scale = max(HEADROOM * amax / ACTIVATION_MAX[entry.format], LEAST_SCALE)
    return replace(entry, reason=reason, full_precision=False, input_scale=scale)


def smoothed(source: Source, plan: Plan, calibration: Calibration) -> Plan:
    """The plan with ``pre_quant_scale`` for every calibrated NVFP4 layer whose activations become FP4.

    Not where the plan folds into all of a layer's inputs, or found that nothing helps there.
    """
    layers, reached = dict(plan.layers), folds.reached(source, plan.folds)
    for name, entry in plan.layers.items():
        seen = source.short(name) in calibration.layers
        if entry.format in smoothing.FORMATS and seen and not entry.full_precision and name not in reached:
            layers[name] = replace(entry, pre_quant_scale=True)
    return sized(source, replace(plan, layers=layers))


def summary(calibration: Calibration) -> dict[str, Any]:
    """What a plan and the header of a file say of the calibration they were made with."""
    names = ("source_file", "source_fingerprint", "tool", "steps", "sampler", "scheduler", "cfg")
    known = {name: calibration.info[name] for name in names if calibration.info.get(name) is not None}
    return {**known, "runs": len(calibration.info.get("runs", [])), "layers": len(calibration.layers)}


def check_widths(source: Source, calibration: Calibration) -> None:
    """CalibQuantError when the calibration cannot be of this model, whatever names it bears."""
    for layer in source.layers:
        seen = calibration.layers.get(source.short(layer))
        width = source.shape(layer)[1]
        if seen and len(seen.input_amax) != width:
            raise CalibQuantError(
                f"{source.path}: layer {layer} has {width} inputs, the calibration saw {len(seen.input_amax)}: "
                "calibrate this model"
            )


def check_calibration(source: Source, calibration: Calibration) -> None:
    """CalibQuantError when the calibration is of another architecture or of another file."""
    check_widths(source, calibration)
    family, made_for = source.architecture.name, calibration.info.get("architecture")
    if made_for not in (None, family):
        raise CalibQuantError(f"{source.path}: is {family}, the calibration is of {made_for}: calibrate this model")
    fingerprint = calibration.info.get("source_fingerprint")
    if fingerprint not in (None, source.checkpoint.fingerprint()):
        raise CalibQuantError(
            f"{source.path}: the calibration was made with another file ({calibration.info.get('source_file')}): "
            "calibrate this model"
        )


def _plan_of(source: Source, name: str, wishes: Mapping[str, LayerPlan]) -> Plan:
    kept = LayerPlan(SOURCE, "not scored")
    layers = {layer: legal(wishes.get(layer, kept), info, source.shape(layer)) for layer, info in source.layers.items()}
    return sized(source, Plan(source.architecture.name, name, source.name, layers))


def by_recipe_name(name: str) -> Recipe:
    if name not in RECIPES:
        raise CalibQuantError(f"unknown recipe {name!r}: use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def legal(wish: LayerPlan, info: LayerInfo, shape: tuple[int, ...], explicit: bool = False) -> LayerPlan:
    """The wish, or the nearest thing that the loader takes, with the reason.

    Protected layers stay in the source dtype unless a rule names them (``explicit``); what is no Linear always does.
    """
    if info.not_linear or (info.protected and not explicit):
        return LayerPlan(SOURCE, info.protected)
    fmt, reason = wish.format, wish.reason
    while fmt != SOURCE:
        obstacle = FORMATS[fmt].obstacle(shape) or (info.detects_shape if changes_shape(FORMATS[fmt], shape) else "")
        if info.formats and fmt not in info.formats:
            obstacle = "of a table ComfyUI reads FP8 and INT8 only"
        if not obstacle:
            note = "" if info.weight_only else WEIGHT_ONLY.get(fmt, "")
            reason = f"{reason}; {note}" if note else reason
            weight_only = (
                wish.full_precision or bool(note) or (info.weight_only and FORMATS[fmt].config(shape) is not None)
            )
            return replace(wish, format=fmt, reason=reason, full_precision=weight_only)
        reason = f"not {title(fmt)}: {obstacle}"
        fmt = FALLBACK.get(fmt, SOURCE)
    return LayerPlan(SOURCE, reason)


def _compile(rules: Iterable[Rule]) -> list[tuple[re.Pattern[str], Rule]]:
    compiled = []
    for rule in rules:
        try:
            compiled.append((re.compile(rule.pattern), rule))
        except re.error as e:
            raise CalibQuantError(f"layer pattern {rule.pattern!r} is no regular expression: {e}") from e
    return compiled


def from_convert_to_quant(
    base: str,
    custom_layers: str | None = None,
    custom_type: str | None = None,
    exclude_layers: str | None = None,
    presets: Iterable[str] = (),
) -> Recipe:
    """A recipe that decides as ``convert_to_quant --BASE --custom-layers … --custom-type … --exclude-layers …`` does.

    The tool's precedence: custom layers beat exclusions, exclusions and presets beat the base format; patterns are
    searched anywhere in the key. ``base`` and ``custom_type`` are the tool's names: fp8, mxfp8, nvfp4, int8.
    Layers that stock ComfyUI could not load in the wanted format still fall back (:func:`legal`).
    """
    if bool(custom_layers) != bool(custom_type):
        raise OptionError("custom layers and a custom type belong together: give both or none")
    rules = []
    if custom_layers and custom_type:
        rules.append(Rule(custom_layers, _ctq_format(custom_type), "custom layer"))
    if exclude_layers:
        rules.append(Rule(exclude_layers, SOURCE, "excluded layer"))
    for preset in presets:
        if preset not in convert_to_quant.PRESETS:
            raise CalibQuantError(f"unknown preset {preset!r}: use one of {', '.join(convert_to_quant.PRESETS)}")
        kept = "|".join(re.escape(part) for part in convert_to_quant.PRESETS[preset])
        rules.append(Rule(kept, SOURCE, f"preset {preset}"))
    return Recipe("convert_to_quant", "convert_to_quant options", _ctq_format(base), tuple(rules))


def _ctq_format(word: str) -> str:
    if word not in convert_to_quant.TYPES:
        raise CalibQuantError(f"unknown convert_to_quant type {word!r}: use one of {', '.join(convert_to_quant.TYPES)}")
    return convert_to_quant.TYPES[word]
