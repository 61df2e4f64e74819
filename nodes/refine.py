"""CalibQuantRefinePlan: a plan for a budget, sampled before it is saved and weighed anew by what the samples say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError
from ..quant_core.models import folding
from ..quant_core.models.folding import Merge
from ..quant_core.models.source import Source
from ..quant_core.planning import recipes, refine, targets
from ..quant_core.planning.plan import Plan
from ..quant_core.planning.refine import Entries, Refined
from ..quant_core.reports import planned
from ..quant_core.rounding.choice import AUTO, Rounder
from ..quant_core.rounding.loaded import Shelf
from .calibrate import (
    SWITCH,
    check_negative,
    expert_inputs,
    jobs_of,
    negative_input,
    prompts_input,
    sample_all,
    sampling_inputs,
)
from .comfyui import emulation, feedback, patches, sampling, vram
from .comfyui.sampling import SamplerSettings
from .types import CATEGORY, PlanType


class CalibQuantRefinePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantRefinePlan",
            display_name="Refine Plan by Sampling",
            category=CATEGORY,
            description="Samples a plan for a size before it is saved, as its card will run it, measures what each "
            "block does to the picture, plans again by that, and keeps the better plan.",
            search_aliases=["verify plan", "quantize", "measure"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model of the plan, with the LoRAs that will be baked in."),
                PlanType.Input("plan", tooltip="From Quantization Plan with the strategy size, bits or max_error."),
                prompts_input(),
                *sampling_inputs(8),
                io.Float.Input(
                    "minutes", default=30.0, min=0.0, max=10000.0, step=1.0,
                    tooltip="Time for all of it. The plan, its controls and the refined plan are sampled in any case; "
                    "blocks, the most damaging first, as long as there is time.",
                ),
                io.Boolean.Input(
                    "measure_controls", default=False,
                    tooltip="Sample the uniform plan and the published recipe of nearly as many bytes, too, and show "
                    "their measured errors beside the predicted ones.",
                ),
                negative_input(),
                *expert_inputs(),
            ],
            outputs=[
                PlanType.Output("plan", tooltip="The better of the two plans, for Save Quantized Model."),
                io.String.Output("text", tooltip="What was measured and what changed."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, model: Any, plan: Plan, conditioning: list[Any], samples: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, width: int, height: int, frames: int, seed: int, minutes: float, measure_controls: bool,
        negative: Any = None, low_noise_model: Any = None, switch_at_step: int = SWITCH,
    ) -> io.NodeOutput:  # fmt: skip
        check_negative(cfg, negative)
        latent = sampling.empty_latent(model, width, height, frames)
        settings, jobs = SamplerSettings(steps, cfg, sampler_name, scheduler), jobs_of(conditioning, samples, seed)
        stages = sampling.stages(model, low_noise_model, switch_at_step, settings)
        planned = patches.stage_of(stages, plan.asked.table.made_with.source if plan.asked else None)

        def draw(of: Any, what: str) -> list[torch.Tensor]:
            drawn: list[torch.Tensor] = []
            named = [(f"{what}\n{text}".strip(), positive, number) for text, positive, number in jobs]
            keep = lambda z: drawn.append(z.float().cpu())  # noqa: E731
            drawing = tuple(replace(each, model=of) if each is planned else each for each in stages)
            sample_all(drawing, named, negative, latent, settings, lambda *_: None, cls.hidden.unique_id, keep)
            return drawn

        if "te" in plan.parts:
            raise CalibQuantError("the plan is for text encoders, too, which are not sampled: refine parts model first")
        with Source(_file(planned.model), kinds=plan.parts) as source:
            refine.check(source, plan)
            sampler = _sampler(planned.model, source, plan, draw, cls.hidden.unique_id)
            found = refine.refine(source, plan, sampler, minutes, measure_controls)
        text = _text(found)
        return io.NodeOutput(found.plan, text, ui={"text": (text,), "calibquant_refined": (found.to_dict(),)})


def _file(model: Any) -> str:
    path = patches.path_of(model)
    if path is None:
        raise CalibQuantError(
            "the linked MODEL does not say which file it came from: load it with Load Diffusion Model"
        )
    return path


def _sampler(
    model: Any, source: Source, plan: Plan, draw: Callable[[Any, str], Sequence[torch.Tensor]], node_id: str | None
) -> refine.Sampler:
    """Samples any entries as the plan's card would run them in a file that Save Quantized Model makes of them."""
    merge = patches.lora_merge(model, source)[0]
    seen = plan.seen() if plan.seen else None
    if seen is not None:
        recipes.check_calibration(source, seen)
    rounder = Rounder(vram.device(), seen, AUTO, source.short)
    read = lambda layer: _read(source, layer, merge)  # noqa: E731
    shelf = Shelf(rounder, read, str(source.path), lambda entry: targets.rounds_inputs(entry, plan.gpu))

    def sample(entries: Entries, what: str) -> Sequence[torch.Tensor]:
        if not entries:
            return draw(model, what)
        feedback.show(node_id, f"rounding {what}")
        with vram.rounding(source, entries, seen is not None):
            layers = shelf.layers(entries, feedback.progress()(0))
        return draw(emulation.with_layers(model, {source.short(n): x for n, x in layers.items()}), what)

    return sample


def _read(source: Source, layer: str, merge: Merge) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias as they go into the file's rounding."""
    key = f"{layer}.bias"
    bias = source.checkpoint.read(key) if key in source.checkpoint.entries else None
    if bias is not None:
        bias = folding.merged(bias, key, merge).to(bias.dtype)
    return folding.merged(source.load(layer), f"{layer}.weight", merge), bias


def _text(found: Refined) -> str:
    return "\n".join([*refine.words(found), *planned.lines(found.plan)])
