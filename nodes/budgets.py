"""The strategies of Quantization Plan that keep to a budget: size, bits a weight, error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError, OptionError
from ..quant_core.evidence.calibration import Calibration
from ..quant_core.evidence.probe import Probe
from ..quant_core.models.source import Source
from ..quant_core.planning import budget, costs, targets, weighing
from ..quant_core.planning.costs import CostTable
from ..quant_core.planning.plan import Plan
from ..quant_core.progress import Progress
from ..quant_core.reports.plan_map import Priced
from .comfyui import feedback, patches, vram

THIS_MACHINE, DEFAULT = "this machine", "auto"
_latest: list[CostTable] = []  # at most one: another size asks for no new measurement


def size_inputs() -> list[Any]:
    tooltip = "Size of the whole file in GB (1e9 bytes), of a split of both. The plan has the least error that fits."
    return [io.Float.Input("size", default=8.0, min=0.001, max=1000.0, step=0.1, tooltip=tooltip), *_shared()]


def bits_inputs() -> list[Any]:
    tooltip = "Bits a weight of the layers that may be quantized, scales included: 4.5 is all NVFP4, 16 the original."
    return [io.Float.Input("bits", default=5.5, min=4.0, max=32.0, step=0.1, tooltip=tooltip), *_shared()]


def error_inputs() -> list[Any]:
    tooltip = "The predicted error. The plan is the smallest file with no more; the node shows the curve."
    return [
        io.Float.Input("max_error", default=0.001, min=1e-8, max=1.0, step=1e-5, round=1e-8, tooltip=tooltip),
        *_shared(),
    ]


def _shared() -> list[Any]:
    return [
        io.Combo.Input(
            "gpu",
            options=[THIS_MACHINE, *targets.GPUS],
            default=THIS_MACHINE,
            tooltip="The card that will run the file. Errors are measured as the loader runs each format there.",
        ),
        io.String.Input(
            "formats",
            default="",
            tooltip=f"Formats to choose from, some of {','.join(costs.OPTIONS)}. Empty: all that this ComfyUI reads, "
            "weight-only ones (w4a16) excepted.",
        ),
        io.Combo.Input(
            "weighting",
            options=[DEFAULT, *weighing.WEIGHTINGS],
            default=DEFAULT,
            tooltip="What a layer's error is worth. auto: gradient where the calibration has sensitivities, else "
            "uniform. hswq weighs by output variance, score by quant_probe's score.",
        ),
        io.Boolean.Input("tie", default=False, tooltip="One format for q, k and v, and for gate and up, of a block."),
        io.Float.Input(
            "max_slow",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of these layers' multiplications that may run outside the card's native kernels.",
        ),
    ]


def make(
    source: Source,
    strategy: dict[str, Any],
    probed: Callable[[], Probe],
    seen: Calibration | None,
    input_scale: bool,
    pre_quant_scale: bool,
    fixed: Mapping[str, str],
    fold: bool = False,
    split: str = "",
) -> tuple[Plan, Priced]:
    """The plan of one of the three strategies, and what it was chosen from; ``probed`` is asked only where needed."""
    if pre_quant_scale:
        raise OptionError(f"pre_quant_scale does not go with the strategy {strategy['strategy']}: switch it off")
    kind = strategy["strategy"]
    slow = None if strategy["max_slow"] >= 1 else strategy["max_slow"]
    wish = budget.Wish(kind, strategy[kind] * (1e9 if kind == "size" else 1), strategy["tie"], slow, fixed)
    wish.check()
    gpu = targets.this_gpu() if strategy["gpu"] == THIS_MACHINE else strategy["gpu"]
    options = costs.choose_options(strategy["formats"].strip() or None, gpu, patches.CORE)
    if seen is None and (fold or split):
        raise CalibQuantError(
            f"{source.path}: {'smooth' if fold else 'a split'} needs a calibration: link one, or leave it off"
        )
    options = costs.with_branches(options, gpu, split) if split else options
    weighting = None if strategy["weighting"] == DEFAULT else strategy["weighting"]
    probe = probed() if seen is None or weighting == "score" else None
    how = costs.made_with(source, gpu, options, "auto", input_scale, seen, fold)
    table = table_of(source, how, seen, lambda: probe, feedback.progress()(0))
    made = budget.plan(source, table, wish, weighting=weighting, calibration=seen, probed=probe)
    assert made.asked is not None
    return made, (table, made.asked.damages(source)[1])


def table_of(
    source: Source,
    how: costs.MadeWith,
    seen: Calibration | None,
    probed: Callable[[], Probe | None],
    progress: Progress,
) -> CostTable:
    """Measured with the calibration, the latest one remembered; without one guessed from the probe."""
    if seen is None:
        probe = probed()
        assert probe is not None
        return costs.guess(source, probe, how)
    if not (_latest and _latest[0].made_with == how):
        with vram.rounding(source, source.layers, True) as device:
            _latest[:] = [costs.measure(source, seen, how, device, progress=progress)]
    return _latest[0]
