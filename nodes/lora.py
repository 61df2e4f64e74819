"""CalibQuantLoadSplit and CalibQuantErrorLora: 16-bit branches beside quantized layers."""

from __future__ import annotations

import contextlib
from pathlib import Path

from comfy_api.latest import io, ui

from ..quant_core import jobs
from ..quant_core.errors import CalibQuantError
from ..quant_core.files.checkpoint import Hasher
from ..quant_core.files.header import Headers
from ..quant_core.files.markers import branch_of
from ..quant_core.models.source import Source
from ..quant_core.planning import recipes
from .comfyui import bypass, feedback, folders, written
from .recorder import CalibrationHandle
from .types import CATEGORY, CalibrationType


class CalibQuantLoadSplit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantLoadSplit",
            display_name="Load Split Model",
            category=CATEGORY,
            description="Loads a model that was quantized with a split, together with the LoRA that it needs. Use "
            "Load LoRA (Bypass, Model Only) after it: the ordinary LoRA loader merges into the quantized weights and "
            "rounds them again, and a second stock bypass loader replaces the first.",
            search_aliases=["split", "svdquant", "load model", "unet", "lora bypass"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.split_names(),
                    tooltip="The main file (….split.safetensors). Its header names its LoRA, which is looked for in "
                    "the loras folders and then beside it.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with its branch, as good as the file can be.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> str:
        if model_name is None:
            return folders.fingerprint(None)
        with contextlib.suppress(CalibQuantError, OSError):
            loras = _loras_of(folders.model_path(model_name))[0]
            return str([folders.fingerprint(model_name), *((lora.stat().st_mtime_ns, str(lora)) for lora in loras)])
        return "missing"

    @classmethod
    @feedback.in_node_words()
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folders.model_path(model_name)
        loras, name, sha256 = _loras_of(path)
        lora = next((lora for lora in loras if Hasher([lora]).result() == sha256), None)
        if lora is None:
            problem = "cannot be found" if not loras else "is another one (its SHA-256 differs)"
            raise CalibQuantError(
                f"{path}: is wrong without its LoRA {name}, which {problem}: put the one made with it into "
                "models/loras or beside it"
            )
        return io.NodeOutput(bypass.with_branch(bypass.load_model(path), lora, path))


def _loras_of(path: Path) -> tuple[list[Path], str, str]:
    """What may be the LoRA of a split's main file, and the name and SHA-256 that the file gives it."""
    with Headers(path) as main:
        named = branch_of(main)
    if named is None:
        raise CalibQuantError(f"{path}: is no split model: use Load Diffusion Model")
    return folders.split_lora_paths(named[0], path), *named


class CalibQuantErrorLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.model_names()
        return io.Schema(
            node_id="CalibQuantErrorLora",
            display_name="Error-Correction LoRA",
            category=CATEGORY,
            description="Makes a LoRA that puts back part of what quantizing took. For Load LoRA (Bypass, Model Only).",
            search_aliases=["lora", "error correction", "low rank", "svd"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("model_name", options=names, tooltip="The 16-bit model that was quantized."),
                io.Combo.Input(
                    "quantized_name", options=names, tooltip="The quantized file made from it. It stays as it is."
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Of the factors of each layer. Twice the rank is twice the file and twice the extra work.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="calibquant/error_lora",
                    tooltip="Below output/loras. A number is appended; nothing is overwritten.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="Of the same model: fits the LoRA to what each layer really sees and loses. Needed for a "
                    "file that was rounded with a calibration.",
                ),
            ],
            outputs=[
                # "*" because the stock loaders' drop-downs take a link of no narrower type
                io.AnyType.Output("lora_name", tooltip="Name of the saved LoRA; link it to a bypass LoRA loader."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, quantized_name: str | None, **_: object) -> str:
        stamps = folders.fingerprint(model_name), folders.fingerprint(quantized_name)
        return f"{stamps} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        model_name: str,
        quantized_name: str,
        rank: int,
        filename_prefix: str,
        calibration: CalibrationHandle | None = None,
    ) -> io.NodeOutput:
        output, loader_name = folders.new_lora_path(filename_prefix)
        with Source(folders.model_path(model_name)) as source:
            feedback.show(cls.hidden.unique_id, f"correcting {quantized_name}")
            seen = calibration.current() if calibration else None
            if seen is not None:
                recipes.check_calibration(source, seen)
                recipes.check_widths(source, seen)
            quantized = folders.model_path(quantized_name)
            report = jobs.error_lora(source, quantized, output, rank, seen, progress=feedback.progress()(0))
        written.remember(cls.hidden.unique_id, output)
        return io.NodeOutput(loader_name, ui=ui.PreviewText(f"{loader_name}\n{report.summary()}"))
