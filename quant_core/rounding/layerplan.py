"""The decision for one layer: what planning makes and rounding obeys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer."""

    format: str  # a key of FORMATS, or "bf16": left in the source dtype
    reason: str
    full_precision: bool = False  # W4A16 / W8A16: the loader dequantizes instead of quantizing activations
    input_scale: float | None = None  # of activations, from a calibration's amax; None: the loader's own rule
    rounding: str = ""  # the job's choice; "hswq": the scale that HSWQ's weighted search finds
    pre_quant_scale: bool = False  # NVFP4 inputs are smoothed (smoothing.py); stock ComfyUI 0.29 cannot read it
    rank: int = 0  # of the 16-bit branch that is split off before rounding (split.py); 0: none
