"""The nodes: a schema each, and a few lines that call the engine."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .calibrate import (
    CalibQuantCalibrate,
    CalibQuantLoadCalibration,
    CalibQuantMonitor,
    CalibQuantSaveCalibration,
)
from .calibrate_clip import CalibQuantCalibrateClip
from .comfyui import folders
from .compare import CalibQuantCompare
from .compare_clip import CalibQuantCompareClip
from .easy import CalibQuantEasy
from .lora import CalibQuantErrorLora, CalibQuantLoadSplit
from .plan import CalibQuantPlan
from .probe import CalibQuantProbe
from .prompts import CalibQuantLoadPromptSet, CalibQuantPromptSet
from .quantize import CalibQuantQuantize
from .refine import CalibQuantRefinePlan
from .sensitivity import CalibQuantSensitivity

NODES: list[type[io.ComfyNode]] = [
    *(CalibQuantProbe, CalibQuantPlan, CalibQuantQuantize, CalibQuantPromptSet, CalibQuantLoadPromptSet),
    *(CalibQuantMonitor, CalibQuantCalibrate, CalibQuantSaveCalibration, CalibQuantLoadCalibration),
    *(CalibQuantErrorLora, CalibQuantLoadSplit, CalibQuantSensitivity, CalibQuantRefinePlan),
    *(CalibQuantCompare, CalibQuantEasy, CalibQuantCalibrateClip, CalibQuantCompareClip),
]


class CalibQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CalibQuantExtension:
    return CalibQuantExtension()
