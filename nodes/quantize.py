"""CalibQuantQuantize ("Save Quantized Model"): write the file that stock ComfyUI loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..quant_core import jobs
from ..quant_core.errors import CalibQuantError
from ..quant_core.files.text import counted
from ..quant_core.models.source import Source
from ..quant_core.planning import recipes
from ..quant_core.planning.plan import Plan
from ..quant_core.progress import Progress
from ..quant_core.reports.report import Report
from ..quant_core.rounding.choice import CHOICES
from .comfyui import feedback, folders, patches, vram, written
from .recorder import CalibrationHandle
from .types import CATEGORY, CalibrationType, PlanType, ReportType

FROM_PLAN, PREFIX = "the plan's file", "calibquant/model"


class CalibQuantQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantQuantize",
            display_name="Save Quantized Model",
            category=CATEGORY,
            description="Quantizes a model file by a plan and saves it where the stock loaders find it.",
            search_aliases=[
                *("quantize", "save model", "compress", "shrink", "convert", "fp4"),
                *("nvfp4", "mxfp8", "fp8", "int8", "w4a8"),
            ],
            is_output_node=True,
            inputs=[  # widgets are all optional: in their old order, workflow files of before still fit
                PlanType.Input("plan", tooltip="From Quantization Plan; knows the model file and the calibration."),
                io.Combo.Input(
                    "model_name",
                    options=[FROM_PLAN, *folders.model_names()],
                    default=FROM_PLAN,
                    optional=True,
                    tooltip="The 16-bit model file, as the plan knows it; choose one yourself for a copy of that file. "
                    "Weights are read from it, not from a loaded MODEL, because loading already casts them.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    optional=True,
                    tooltip="Below output/diffusion_models (output/checkpoints for an all-in-one checkpoint, "
                    "output/clip for a text encoder). "
                    "A number is appended; nothing is overwritten.",
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    optional=True,
                    tooltip="Re-read the saved file by the loader's own arithmetic and compare every layer's error.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Link a MODEL loaded from the same file to bake its LoRAs in (in float32, before "
                    "quantizing). Baking first keeps more quality than a LoRA on a quantized model.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="How weights are rounded. auto: GPTQ where a calibration allows it, else searched scales "
                    "for NVFP4 and nearest for the rest. All make files of one size.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Load Calibration or Calibrate, of the same model: lets GPTQ and the scale search "
                    "weigh errors by what each layer really sees. Not linked: the one that the plan was made with.",
                ),
            ],
            outputs=[
                # "*" because the stock loaders' drop-downs take a link of no narrower type
                io.AnyType.Output(
                    "model_name", tooltip="Name of the saved file; link it to Load Diffusion Model (Load CLIP)."
                ),
                ReportType.Output("report", tooltip="Sizes and the error of every layer."),
                io.AnyType.Output(
                    "lora_name",
                    tooltip="With a split: name of the LoRA without which the file is wrong; link it to Load LoRA "
                    "(Bypass, Model Only), or link model_name alone to Load Split Model. Empty otherwise.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str = FROM_PLAN, **_: object) -> str:
        file = "" if model_name == FROM_PLAN else folders.fingerprint(model_name)
        return f"{file} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        plan: Plan,
        model_name: str = FROM_PLAN,
        filename_prefix: str = PREFIX,
        verify: bool = True,
        model: Any = None,
        rounding: str = "auto",
        calibration: CalibrationHandle | None = None,
    ) -> io.NodeOutput:
        told = [f"warning: {note}" for note in patches.check_core(plan)]
        if model_name == FROM_PLAN:
            path = _file_of(plan)
            model_name = folders.name_of(path)
        else:
            path = folders.model_path(model_name)
        (output, loader_name), *branch = (
            folders.split_paths(filename_prefix, model_name)
            if plan.ranks()
            else [folders.output_path(filename_prefix, model_name)]
        )
        with Source(path, kinds=plan.parts) as source:
            merge, digest = patches.lora_merge(model, source) if model is not None else ({}, "")
            current = calibration.current if calibration else plan.seen
            seen = current() if current else None
            if seen is not None:
                recipes.check_calibration(source, seen)
            with vram.rounding(source, plan.quantized(), seen is not None) as device:
                report = jobs.quantize(
                    source,
                    plan,
                    output,
                    merge=merge,
                    merged=digest,
                    calibration=seen,
                    rounding=rounding,
                    device=str(device),
                    verify=verify,
                    lora_output=branch[0][0] if branch else None,
                    progress=counting_layers(
                        cls.hidden.unique_id, plan, output.name, *map(feedback.progress(2), (0, 1))
                    ),
                )
        written.remember(cls.hidden.unique_id, output, *(path for path, _ in branch))
        lora_name = branch[0][1] if branch else ""
        lines = [loader_name, report.summary(), *told, *about_model(model, merge)]
        return io.NodeOutput(loader_name, report, lora_name, ui=words_and_data(lines, report, loader_name, lora_name))


def _file_of(plan: Plan) -> Path:
    if plan.path is None:
        raise CalibQuantError(f"the plan does not know its file ({plan.source}): choose it as model_name")
    return plan.path


def words_and_data(lines: list[str], report: Report, loader_name: str, lora_name: str = "") -> dict[str, Any]:
    """A node's ``ui``: text for people, and under ``calibquant_result`` one object for programs."""
    place = {"path": folders.shown(Path(report.output)), "model_name": loader_name, "lora_name": lora_name}
    return {"text": ["\n".join(lines)], "calibquant_result": [{**place, **report.facts()}]}


def about_model(model: Any, merge: dict[str, Any]) -> list[str]:
    """What a linked MODEL brought in."""
    lines = [f"baked in: what LoRA and merge nodes changed, {counted(len(merge), 'tensor')}"] if merge else []
    if model is not None and not patches.leaves_trail(model):
        lines.append("note: the linked MODEL does not say which file it came from; only names and shapes were compared")
    return lines


def counting_layers(node_id: str | None, plan: Plan, name: str, writing: Progress, checking: Progress) -> Progress:
    """Progress of ``jobs.quantize`` on a bar's parts for rounding and for verifying, and in words that count layers."""
    rounded, wanted, layers = 0, plan.quantized().keys(), len(plan.layers)
    rounding = feedback.counting(node_id, f"quantizing {plan.source}", writing)
    verifying: Progress | None = None

    def update(done: int, total: int, text: str) -> None:
        nonlocal rounded, verifying
        if text.startswith("verify "):
            verifying = verifying or feedback.counting(node_id, f"verifying {name}", checking)
            verifying(done - (total - layers), layers, text)
        else:
            rounding(rounded, len(wanted), text)
            rounded += text.removesuffix(".weight") in wanted

    return update
