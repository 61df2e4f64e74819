"""The types of our links and the menu our nodes are in."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "quantization/CalibQuant"

PlanType = io.Custom("CALIBQUANT_PLAN")
ProbeType = io.Custom("CALIBQUANT_PROBE")
ReportType = io.Custom("CALIBQUANT_REPORT")
CalibrationType = io.Custom("CALIBQUANT_CALIBRATION")
ConditioningSetType = io.Custom("CALIBQUANT_CONDITIONING_SET")
