"""CalibQuantPlan: decide a format per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence.calibration import Calibration
from ..quant_core.evidence.probe import Probe
from ..quant_core.files.text import change_of_size, counted
from ..quant_core.formats import title
from ..quant_core.models.source import Source
from ..quant_core.planning import (
    convert_to_quant,
    costs,
    folding,
    folds,
    recipes,
    rotation,
    scoring,
    splitting,
    targets,
)
from ..quant_core.planning import edits as by_hand
from ..quant_core.planning.plan import Plan
from ..quant_core.reports import plan_map, planned
from . import budgets
from .comfyui import feedback, folders, patches, vram
from .probe import chosen, percentile_inputs, probe_path
from .recorder import CalibrationHandle
from .types import CATEGORY, CalibrationType, PlanType, ProbeType

_TYPES = list(convert_to_quant.TYPES)


class CalibQuantPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantPlan",
            display_name="Quantization Plan",
            category=CATEGORY,
            description="Decides a format for every layer of a 16-bit model, with a reason and the exact file size.",
            search_aliases=[
                *("quantize", "compress", "shrink", "convert", "fp4"),
                *("nvfp4", "mxfp8", "fp8", "int8", "w4a8", "convrot"),
            ],
            has_intermediate_output=True,  # a cached plan shows its map again
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    tooltip="The 16-bit model file to quantize. All-in-one checkpoints are listed as checkpoints/NAME, "
                    "text encoders as text_encoders/NAME.",
                ),
                io.DynamicCombo.Input(
                    "strategy",
                    options=[io.DynamicCombo.Option(name, inputs()) for name, inputs in _STRATEGIES.items()],
                    tooltip="How formats are chosen: a named recipe, convert_to_quant's layer patterns, or from a "
                    "probe of the weights: quant_probe's score (percentiles) or the measured error (keep_ratio); "
                    "HSWQ's rule from a calibration; or size, bits, max_error: the least error for so many bytes.",
                ),
                ProbeType.Input(
                    "probe",
                    optional=True,
                    tooltip="From Probe Model Weights, of the same file. Without it, percentiles and keep_ratio probe "
                    "the file themselves.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Load Calibration or Calibrate, of the same model. FP8 and NVFP4 layers then get "
                    "activation scales, and FP8 runs as W8A8 instead of weight-only.",
                ),
                io.Boolean.Input(
                    "input_scale",
                    default=True,
                    optional=True,
                    tooltip="With a calibration: store the activation scales. Off leaves them to the loader, and FP8 "
                    "runs weight-only.",
                ),
                io.Boolean.Input(
                    "pre_quant_scale",
                    default=False,
                    optional=True,
                    tooltip="With a calibration: smooth the inputs of NVFP4 layers, so that FP4 activations lose less. "
                    "Needs a ComfyUI that reads it (newer than 0.29) wherever the file is used; LoRAs added later "
                    "do not fit such a file.",
                ),
                io.Combo.Input(
                    "rotate",
                    options=list(rotation.CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="INT8 layers of a recipe in a rotated basis, which spreads loud channels. auto: where that "
                    "measures better, on the calibration's inputs if one is linked. W4A8 and W6A8 always rotate.",
                ),
                io.Combo.Input(
                    "smooth",
                    options=["none", "fold"],
                    default="none",
                    optional=True,
                    tooltip="With a calibration: fold smooths loud input channels through the weights that make them, "
                    "wherever that measures better. Every ComfyUI loads such a file; LoRAs made for the original do "
                    "not fit it, so bake them in.",
                ),
                io.String.Input(
                    "split",
                    default="",
                    optional=True,
                    tooltip="With a calibration: a 16-bit branch of low rank takes up what rounding the inputs costs "
                    "(most of NVFP4's error on RTX 50). A mean rank such as 16, or a share of the file such as 6%; for "
                    "size, bits and max_error a rank, and each layer gets what pays. "
                    "Saves two files that belong together: load them with Load Split Model. Empty: none.",
                ),
                io.String.Input(
                    "edits",
                    default="",
                    optional=True,
                    socketless=True,
                    tooltip='Layers set by hand, as JSON {"LAYER": "FORMAT"}: the map on the node writes it. All other '
                    "layers are planned around them.",
                    extra_dict={"hidden": True},  # an input all the same: in the workflow, and for API clients
                ),
                io.Combo.Input(
                    "parts",
                    options=list(folders.PARTS),
                    default=folders.PARTS[0],
                    optional=True,
                    tooltip="Of an all-in-one checkpoint: model is the diffusion model, te its text encoders (scales "
                    "are read for T5 and language models, not for CLIP), vae its VAE. What no scale is read for is "
                    "stored as float16 where it is float32. All else is copied as it is.",
                ),
            ],
            outputs=[PlanType.Output("plan", tooltip="One decision per layer, for Save Quantized Model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: object) -> str:
        return folders.fingerprint(model_name)

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        model_name: str,
        strategy: dict[str, Any] | None = None,
        probe: Probe | None = None,
        calibration: CalibrationHandle | None = None,
        input_scale: bool = True,
        pre_quant_scale: bool = False,
        rotate: str = "auto",
        smooth: str = "none",
        split: str = "",
        edits: str = "",
        parts: str = folders.PARTS[0],
    ) -> io.NodeOutput:
        strategy, fixed = chosen("strategy", strategy, _STRATEGIES), by_hand.from_json(edits)
        if pre_quant_scale:
            patches.require_pre_quant_scale()
        with Source(folders.model_path(model_name), kinds=folders.kinds(parts)) as source:
            seen = calibration.current() if calibration else None
            if seen is not None:
                recipes.check_calibration(source, seen)
            unedited, priced, warnings = None, None, []
            if strategy["strategy"] in _BUDGETS:
                _check_same_file(probe, source)
                words = strategy, lambda: probe or _probed(source), seen, input_scale, pre_quant_scale
                plan, priced = budgets.make(source, *words, fixed, smooth == "fold", split.strip())
                smooth = split = ""  # were options like the formats
            else:
                unedited, warnings = _plan(source, strategy, probe, seen)
                plan = by_hand.applied(source, unedited, fixed)
            plan = recipes.calibrated(source, plan, seen) if seen is not None and input_scale else plan
            plan = _folded(source, plan, seen) if smooth == "fold" else plan
            if strategy["strategy"] == "recipe":
                plan = rotation.rotated(source, plan, rotate, seen, feedback.progress()(0), but=fixed)
            plan = _smoothed(source, plan, seen) if pre_quant_scale else plan
            plan = _split(source, plan, seen, split) if split.strip() else plan
            plan = replace(plan, path=source.path, seen=calibration.current if calibration else None)
            told = [*source.warnings(), *warnings, *patches.check_core(plan)]
            notes = [f"warning: {note}" for note in told if note]
            before, branches = source.checkpoint.nbytes(), splitting.summary(source, plan)
            options = priced[0].options if priced else costs.choose_options(None, "any", patches.CORE)
            drawn = plan_map.document(source, plan, options, fixed, priced, seen if input_scale else None, unedited)
        counts = " · ".join(f"{n} {title(fmt)}" for fmt, n in plan.count().items())
        sizes = change_of_size(before, plan.size)
        lines = [f"{source.architecture.title}: {counts}", sizes, *folds.summary(plan.folds), *branches]
        lines += [counted(len(fixed), "layer") + " set by hand"] * bool(fixed)
        lines += [*notes, *planned.lines(plan, source)]
        return io.NodeOutput(plan, ui={"text": ["\n".join(lines)], "calibquant_plan": [drawn]})


def _recipe_input() -> io.Combo.Input:
    return io.Combo.Input(
        "recipe",
        options=list(recipes.RECIPES),
        tooltip=f"A named rule set. {'; '.join(_recipe_help(recipe) for recipe in recipes.RECIPES.values())}.",
    )


def _recipe_help(recipe: recipes.Recipe) -> str:
    return f"{recipe.name}: {targets.describe(recipe.base)}" + ("; other layers mixed in" if recipe.rules else "")


def _pattern_inputs() -> list[io.Combo.Input | io.String.Input]:
    return [
        io.Combo.Input("base", options=_TYPES, default="nvfp4", tooltip="Format of every layer not named below."),
        io.String.Input("custom_layers", default="", tooltip="Regular expression: layers that get the custom type."),
        io.Combo.Input("custom_type", options=_TYPES, default="mxfp8", tooltip="Format of the custom layers."),
        io.String.Input(
            "exclude_layers",
            default="",
            tooltip="Regular expression: layers left in the source dtype. Custom layers win where both match.",
        ),
    ]


def _ratio_input(largest: str) -> io.Float.Input:
    tooltip = f"Share of the layers, those with the largest {largest} first, that stays 16-bit."
    return io.Float.Input("ratio", default=0.25, min=0.0, max=1.0, step=0.05, tooltip=tooltip)


def _ratio_inputs() -> list[io.Combo.Input | io.Float.Input]:
    return [
        _ratio_input("measured error in base"),
        io.Combo.Input("base", options=_TYPES, default="nvfp4", tooltip="Format of all other layers."),
    ]


def _hswq_inputs() -> list[io.Float.Input | io.Combo.Input]:
    return [
        _ratio_input("output variance"),
        io.Combo.Input(
            "version",
            options=list(_HSWQ),
            tooltip="V2 stores the searched scale; V1 is a plain FP8 cast, which its clipping never improves.",
        ),
    ]


def _by_score(source: Source, probed: Callable[[], Probe], strategy: dict[str, Any]) -> Plan:
    percentiles = {name: strategy[name] for name in ("fp8_percentile", "keep_percentile")}
    options = replace(scoring.defaults(source.architecture.name), **percentiles)
    scoring.check(source.architecture.name, options)  # before the reading
    return recipes.by_score(source, probed(), options)


def _keep_worst(source: Source, probed: Callable[[], Probe], strategy: dict[str, Any]) -> Plan:
    scoring.check_ratio(strategy["ratio"])
    return recipes.keep_worst(source, probed(), strategy["ratio"], convert_to_quant.TYPES[strategy["base"]])


_FROM_PROBE: dict[str, Callable[[Source, Callable[[], Probe], dict[str, Any]], Plan]] = {
    "percentiles": _by_score,
    "keep_ratio": _keep_worst,
}
_BUDGETS: dict[str, Callable[[], list[Any]]] = {
    "size": budgets.size_inputs,
    "bits": budgets.bits_inputs,
    "max_error": budgets.error_inputs,
}
_STRATEGIES: dict[str, Callable[[], list[Any]]] = {
    "recipe": lambda: [_recipe_input()],
    "convert_to_quant": _pattern_inputs,
    "percentiles": percentile_inputs,
    "keep_ratio": _ratio_inputs,
    "hswq": _hswq_inputs,
    **_BUDGETS,
}
_HSWQ = {"V2 (scaled)": True, "V1 (plain cast)": False}


def _plan(
    source: Source, strategy: dict[str, Any], linked: Probe | None, seen: Calibration | None
) -> tuple[Plan, list[str]]:
    """The plan, and what the user should know of the way it was made."""
    _check_same_file(linked, source)
    if strategy["strategy"] == "hswq":
        if seen is None:
            raise CalibQuantError(f"{source.path}: the hswq strategy needs a calibration: link one")
        return recipes.hswq(source, seen, strategy["ratio"], _HSWQ[strategy["version"]]), []
    if make := _FROM_PROBE.get(strategy["strategy"]):
        return make(source, lambda: linked or _probed(source), strategy), []
    recipe = _recipe(strategy)
    return recipes.make_plan(source, recipe), [recipe.warning, *recipes.unmatched(source, recipe)]


def _folded(source: Source, plan: Plan, seen: Calibration | None) -> Plan:
    if seen is None:
        raise CalibQuantError(f"{source.path}: smooth needs a calibration: link one, or choose none")
    return folding.folded(source, plan, seen, feedback.progress()(0))


def _smoothed(source: Source, plan: Plan, seen: Calibration | None) -> Plan:
    if seen is None:
        raise CalibQuantError(f"{source.path}: pre_quant_scale needs a calibration: link one, or switch it off")
    return recipes.smoothed(source, plan, seen)


def _split(source: Source, plan: Plan, seen: Calibration | None, wanted: str) -> Plan:
    if seen is None:
        raise CalibQuantError(f"{source.path}: a split needs a calibration: link one, or leave split empty")
    with vram.rounding(source, plan.quantized(), True) as device:
        return splitting.split(source, plan, seen, wanted, feedback.progress()(0), str(device))


def _probed(source: Source) -> Probe:
    return probe_path(source.path, feedback.progress()(0), source.kinds)


def _check_same_file(probed: Probe | None, source: Source) -> None:
    if probed is not None and (probed.source, probed.bytes) != (source.name, source.checkpoint.nbytes()):
        raise CalibQuantError(
            f"{source.path}: the linked probe is of another file ({probed.source}): choose the same model in both nodes"
        )
    if probed is not None and source.kinds:
        raise CalibQuantError(
            f"{source.path}: the linked probe knows the diffusion model alone: unlink it, or choose parts model"
        )


def _recipe(strategy: dict[str, str]) -> recipes.Recipe:
    if strategy["strategy"] == "recipe":
        return recipes.by_recipe_name(strategy["recipe"])
    custom = strategy["custom_layers"]
    return recipes.from_convert_to_quant(
        strategy["base"],
        custom or None,
        strategy["custom_type"] if custom else None,
        strategy["exclude_layers"] or None,
    )
