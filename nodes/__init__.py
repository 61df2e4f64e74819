"""The nodes: a schema each, and a few lines that call the engine."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import comfyui
from .plan import CalibQuantPlan
from .prompts import CalibQuantLoadPromptSet
from .quantize import CalibQuantQuantize

NODES: list[type[io.ComfyNode]] = [CalibQuantPlan, CalibQuantQuantize, CalibQuantLoadPromptSet]


class CalibQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        comfyui.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CalibQuantExtension:
    return CalibQuantExtension()
