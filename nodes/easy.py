"""CalibQuantEasy ("Quantize Model"): two questions, which model and for which card, and the file is there."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..quant_core import jobs
from ..quant_core.evidence.calibration import Calibration
from ..quant_core.files.text import change_of_size
from ..quant_core.formats import title
from ..quant_core.models.source import Source
from ..quant_core.planning import easy, recipes, targets
from ..quant_core.planning.costs import CostTable, MadeWith
from ..quant_core.planning.plan import Plan
from ..quant_core.progress import Progress
from ..quant_core.reports.report import Report
from . import budgets
from .comfyui import feedback, folders, patches, vram, written
from .probe import probe_path
from .quantize import about_model, counting_layers, words_and_data
from .recorder import CalibrationHandle
from .types import CATEGORY, CalibrationType, ReportType

ROUNDING = "auto"
MAX_STEM = 120  # bytes of the source's name that go into the output's
PARTS = 3  # of the bar: planning, rounding, verifying


class CalibQuantEasy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantEasy",
            display_name="Quantize Model",
            category=CATEGORY,
            description="Makes a 16-bit model small for your card: plans, rounds, checks and saves it in one go.",
            search_aliases=[
                "quantize",
                "compress",
                "shrink",
                "convert",
                "fp4",
                "nvfp4",
                "mxfp8",
                "fp8",
                "int8",
                "w4a8",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    default=folders.first_original(),
                    tooltip="The 16-bit model file. All-in-one checkpoints are listed as checkpoints/NAME, "
                    "text encoders as text_encoders/NAME.",
                ),
                io.Combo.Input(
                    "card",
                    options=list(easy.CHOICES),
                    tooltip="The card that will run the file: it gets formats that this card multiplies natively. Or "
                    "what counts most, whatever the card.",
                ),
                io.Float.Input(
                    "size",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    round=0.0001,
                    optional=True,
                    tooltip="Size of the file in GB (1e9 bytes): the least error that fits. 0: as small as is good for "
                    "the card.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Load Calibration, Calibrate or Measure Sensitivity, of the same model: 4-bit layers "
                    "then err several times less, and FP8 runs natively.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A loaded MODEL instead of model_name: its file is found, and its LoRAs are baked in.",
                ),
            ],
            outputs=[
                # "*" because the stock loaders' drop-downs take a link of no narrower type
                io.AnyType.Output(
                    "model_name", tooltip="Name of the file; link it to Load Diffusion Model (Load CLIP)."
                ),
                ReportType.Output("report", tooltip="Sizes and the error of every layer."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: object) -> str:
        return f"{folders.fingerprint(model_name)} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        model_name: str,
        card: str,
        size: float = 0.0,
        calibration: CalibrationHandle | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        path = folders.model_path(model_name) if model is None else patches.source_path(model)
        name = model_name if model is None else folders.name_of(path)
        row, bar = easy.card_of(card), feedback.progress(PARTS)
        with Source(path) as source:
            merge, digest = patches.lora_merge(model, source) if model is not None else ({}, "")
            seen = calibration.current() if calibration else None
            if seen is not None:
                recipes.check_calibration(source, seen)
            plan, notes = _plan(source, row, size, seen, cls.hidden.unique_id, bar(0))
            if card == easy.THIS_MACHINE and row.gpu == targets.ANY:
                notes.append(
                    "no NVIDIA card of the list was found in this machine: choose the card that will run the file"
                )
            notes += [f"warning: {note}" for note in (*source.warnings(), *patches.check_core(plan))]
            root = folders.output_root(name)
            there = jobs.find_finished(root, source, plan, digest, seen, ROUNDING)
            if there is None:
                output, loader_name = folders.output_path(_prefix(source, row), name)
                bars = counting_layers(cls.hidden.unique_id, plan, output.name, bar(1), bar(2))
                words = {"merge": merge, "merged": digest, "calibration": seen, "rounding": ROUNDING}
                with vram.rounding(source, plan.quantized(), seen is not None) as device:
                    report = jobs.quantize(
                        source, plan, output, **words, device=str(device), verify=True, progress=bars
                    )
            else:
                output, loader_name = there, str(there.relative_to(root))
                watch = feedback.counting(cls.hidden.unique_id, f"measuring {there.name}, which is there", bar(1))
                report = jobs.compare(source, there, watch, merge=merge)
                report = replace(report, recipe=plan.recipe, needs_comfyui=targets.core_needed(plan))
        written.remember(cls.hidden.unique_id, output)
        lines = [_sentence(report, plan, name, loader_name, there is not None), _formats(report), *notes]
        lines += about_model(model, merge)
        return io.NodeOutput(loader_name, report, ui=words_and_data(lines, report, loader_name))


def _plan(
    source: Source, row: easy.Card, size: float, seen: Calibration | None, node_id: str | None, bar: Progress
) -> tuple[Plan, list[str]]:
    def watched(what: str) -> Progress:
        return feedback.counting(node_id, f"{what} {source.name}", bar)

    def tabled(how: MadeWith) -> CostTable:
        trying = watched("trying formats on") if seen else watched("reading the weights of")
        return budgets.table_of(source, how, seen, lambda: probe_path(source.path, trying), trying)

    more = {"calibration": seen, "size": size * 1e9, "comfyui": patches.CORE}
    return easy.plan(source, row, **more, tabled=tabled, progress=watched("planning"))


def _prefix(source: Source, row: easy.Card) -> str:
    """calibquant/NAME_CARD, of what every system takes in a file's name."""
    stem = re.sub(r"[^\w.-]+", "_", source.path.stem).encode()[:MAX_STEM].decode(errors="ignore")
    return f"calibquant/{stem.strip('. ') or 'model'}_{row.slug}"


def _sentence(report: Report, plan: Plan, model_name: str, loader_name: str, there: bool) -> str:
    """All that a person asks first, in one line."""
    loader = folders.loader_of(model_name)
    parts = [
        change_of_size(report.bytes_before, report.bytes_after),
        *([f"already there: {loader_name}"] if there else ["checked", f"saved as {loader_name}"]),
        f"{loader} finds it",
        targets.fast_on(plan),
        f"needs ComfyUI ≥ {report.needs_comfyui}",
    ]
    return " · ".join(parts)


def _formats(report: Report) -> str:
    counts = " · ".join(f"{n} {title(fmt)}" for fmt, n in report.count().items())
    worst = report.worst()
    return f"layers: {counts}" + (f"; largest relative weight error {worst.error:.1e} ({worst.name})" if worst else "")
