"""CalibQuantPlan: decide a format per layer."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..quant_core import convert_to_quant, recipes
from ..quant_core.formats import title
from ..quant_core.source import Source
from ..quant_core.textfile import gigabytes
from . import comfyui

_TYPES = list(convert_to_quant.TYPES)


class CalibQuantPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantPlan",
            display_name="Quantization Plan",
            category=comfyui.CATEGORY,
            description="Decides a format for every layer of a 16-bit model, with a reason and the exact file size.",
            search_aliases=["quantize", "nvfp4", "mxfp8", "fp8", "int8"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfyui.model_names(),
                    tooltip="The 16-bit model file to quantize. All-in-one checkpoints are listed as checkpoints/NAME.",
                ),
                io.DynamicCombo.Input(
                    "strategy",
                    options=[
                        io.DynamicCombo.Option("recipe", [_recipe_input()]),
                        io.DynamicCombo.Option("convert_to_quant", _pattern_inputs()),
                    ],
                    tooltip="How formats are chosen: a named recipe, or convert_to_quant's layer patterns.",
                ),
            ],
            outputs=[comfyui.PlanType.Output("plan", tooltip="One decision per layer, for Save Quantized Model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: object) -> str:
        return comfyui.fingerprint(model_name)

    @classmethod
    def execute(cls, model_name: str, strategy: dict[str, str]) -> io.NodeOutput:
        with Source(comfyui.model_path(model_name)) as source:
            recipe = _recipe(strategy)
            plan = recipes.make_plan(source, recipe)
            notes = [f"warning: {note}" for note in [*source.warnings(), recipe.warning] if note]
            before = source.checkpoint.nbytes()
        counts = " · ".join(f"{n} {title(fmt)}" for fmt, n in plan.count().items())
        lines = [f"{source.architecture.title}: {counts}", f"{gigabytes(before)} → {gigabytes(plan.size)}", *notes]
        return io.NodeOutput(plan, ui=ui.PreviewText("\n".join(lines)))


def _recipe_input() -> io.Combo.Input:
    return io.Combo.Input(
        "recipe",
        options=list(recipes.RECIPES),
        tooltip="A named rule set. nvfp4 is smallest (RTX 50 runs it fastest), mxfp8 is near-lossless on RTX 50, "
        "fp8 suits RTX 40, int8 RTX 20/30. The zimage recipes mix formats as published.",
    )


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
