"""CalibQuantQuantize ("Save Quantized Model"): write the file that stock ComfyUI loads."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..quant_core import jobs
from ..quant_core.files.text import counted
from ..quant_core.models.source import Source
from ..quant_core.planning import recipes
from ..quant_core.planning.plan import Plan
from ..quant_core.progress import Progress
from ..quant_core.rounding.choice import CHOICES
from .comfyui import feedback, folders, patches, written
from .recorder import CalibrationHandle
from .types import CATEGORY, CalibrationType, PlanType, ReportType


class CalibQuantQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantQuantize",
            display_name="Save Quantized Model",
            category=CATEGORY,
            description="Quantizes a model file by a plan and saves it where the stock loaders find it.",
            search_aliases=["quantize", "save model", "nvfp4", "mxfp8", "fp8", "int8"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    tooltip="The 16-bit model file. Weights are read from this file, not from a loaded MODEL, "
                    "because loading already casts them.",
                ),
                PlanType.Input("plan", tooltip="From Quantization Plan, made for the same file."),
                io.String.Input(
                    "filename_prefix",
                    default="calibquant/model",
                    tooltip="Below output/diffusion_models (or output/checkpoints for an all-in-one checkpoint). "
                    "A number is appended; nothing is overwritten.",
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
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
                io.AnyType.Output("model_name", tooltip="Name of the saved file; link it to Load Diffusion Model."),
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
    def fingerprint_inputs(cls, model_name: str, **_: object) -> str:
        return f"{folders.fingerprint(model_name)} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        model_name: str,
        plan: Plan,
        filename_prefix: str,
        verify: bool,
        model: Any = None,
        rounding: str = "auto",
        calibration: CalibrationHandle | None = None,
    ) -> io.NodeOutput:
        told = [f"warning: {note}" for note in patches.check_core(plan)]
        (output, loader_name), *branch = (
            folders.split_paths(filename_prefix, model_name)
            if plan.ranks()
            else [folders.output_path(filename_prefix, model_name)]
        )
        with Source(folders.model_path(model_name)) as source:
            merge, digest = patches.lora_merge(model, source) if model is not None else ({}, "")
            feedback.show(cls.hidden.unique_id, f"quantizing {source.name}")
            current = calibration.current if calibration else plan.seen
            seen = current() if current else None
            if seen is not None:
                recipes.check_calibration(source, seen)
            report = jobs.quantize(
                source,
                plan,
                output,
                merge=merge,
                merged=digest,
                calibration=seen,
                rounding=rounding,
                verify=verify,
                lora_output=branch[0][0] if branch else None,
                progress=_progress(cls.hidden.unique_id, output.name),
            )
        written.remember(cls.hidden.unique_id, output, *(path for path, _ in branch))
        lora_name = branch[0][1] if branch else ""
        lines = [loader_name, report.summary(), *told, *_about(model, merge)]
        return io.NodeOutput(loader_name, report, lora_name, ui=ui.PreviewText("\n".join(lines)))


def _about(model: Any, merge: dict[str, Any]) -> list[str]:
    """What a linked MODEL brought in."""
    lines = [f"baked in: what LoRA and merge nodes changed, {counted(len(merge), 'tensor')}"] if merge else []
    if model is not None and not patches.leaves_trail(model):
        lines.append("note: the linked MODEL does not say which file it came from; only names and shapes were compared")
    return lines


def _progress(node_id: str | None, name: str) -> Progress:
    """The bar, and a word on the node when verifying begins."""
    bar, told = feedback.progress()(0), []

    def update(done: int, total: int, text: str) -> None:
        if text.startswith("verify ") and not told:
            told.append(text)
            feedback.show(node_id, f"verifying {name}")
        bar(done, total, text)

    return update
