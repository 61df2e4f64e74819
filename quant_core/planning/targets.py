"""What a file asks of the machine that loads it: which ComfyUI reads it, and on which cards it runs fast.

One table. Whether the ComfyUI at hand can read a file is asked of its own source text, not of its version number.
Cards are those that comfy-kitchen's layouts name as their least compute capability; elsewhere the loader dequantizes:
the file is as small, but no faster than 16 bit.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import CalibQuantError
from ..locate import find_comfyui
from ..rounding import smoothing
from .plan import Plan

LEAST_CORE = "0.29"  # that this pack supports at all


@dataclass(frozen=True)
class Target:
    """What one format, or one extra tensor, asks for.

    bits: stored per weight, with scales. capability: the least of a GPU whose kernels multiply in this format, "" for
    none. core: the first ComfyUI that reads it. word: what its ``comfy/quant_ops.py`` then holds. kitchen: the first
    comfy-kitchen whose kernels do, and a module that it has. silent: an older ComfyUI loads the file without an error,
    and draws noise.
    """

    title: str
    bits: float = 0.0
    capability: str = ""
    cards: str = ""
    core: str = LEAST_CORE
    word: str = ""
    kitchen: tuple[str, str] | None = None
    silent: bool = False

    def missing(self, comfyui: Path) -> bool:
        """Whether the ComfyUI in this folder cannot read it (with the comfy-kitchen installed here)."""
        loader = comfyui / "comfy" / "quant_ops.py"
        if self.word and not (loader.is_file() and self.word in loader.read_text(encoding="utf-8")):
            return True
        return self.kitchen is not None and importlib.util.find_spec(self.kitchen[1]) is None

    def core_needed(self) -> str:
        return self.core + (f" with comfy-kitchen {self.kitchen[0]}" if self.kitchen else "")


_W4A8 = {"capability": "8.0", "cards": "RTX 30 and newer", "core": "0.31", "word": '"asym_w4a8_int8"'}
TARGETS: dict[str, Target] = {
    "nvfp4": Target("NVFP4", 4.5, "10.0", "RTX 50"),
    "asym_w4a8_int8": Target("W4A8", 4.5, **_W4A8),
    "asym_w6a8_int8": Target("W6A8", 6.5, **_W4A8, kitchen=("0.2.38", "comfy_kitchen.tensor.w4a8_packed")),
    "mxfp8": Target("MXFP8", 8.25, "10.0", "RTX 50"),
    "float8_e4m3fn": Target("FP8", 8.0, "8.9", "RTX 40 and newer with a calibration"),
    "int8_convrot": Target("INT8 ConvRot", 8.0, "7.5", "RTX 20 and newer"),
    "int8_tensorwise": Target("INT8", 8.0, "7.5", "RTX 20 and newer"),
    "float8_e4m3fn_unscaled": Target("FP8 without scale", 8.0),
}
SMOOTHED = Target(smoothing.KEY, core="0.31", word=f'"{smoothing.KEY}"', silent=True)


def needs(plan: Plan) -> list[Target]:
    """What a file of this plan needs that not every supported ComfyUI has."""
    found = [TARGETS[fmt] for fmt in plan.count() if fmt in TARGETS]
    found += [SMOOTHED] if any(entry.pre_quant_scale for entry in plan.layers.values()) else []
    return [target for target in found if target.word]


def core_needed(plan: Plan) -> str:
    """The first ComfyUI that reads a file of this plan, for headers and reports: "0.31"."""
    return max([LEAST_CORE, *(target.core_needed() for target in needs(plan))])


def describe(fmt: str) -> str:
    """Bits, cards and ComfyUI of a format, in a few words for a drop-down's help."""
    target = TARGETS[fmt]
    fast = f"fast on {target.cards}" if target.cards else "16-bit arithmetic everywhere"
    return f"{target.bits:g} bits a weight, {fast}, ComfyUI ≥ {target.core_needed()}"


def check_core(plan: Plan, comfyui: Path | None = None) -> list[str]:
    """Warnings about the ComfyUI in this folder (default: the one found on this machine) and a file of this plan.

    CalibQuantError where it would load the file without an error and draw noise.
    """
    comfyui = comfyui or find_comfyui()
    notes = []
    for target in needs(plan):
        if comfyui is None:
            if target.silent:
                notes.append(
                    f"no ComfyUI found: only one whose comfy/quant_ops.py knows {target.title} can use this file"
                )
        elif target.missing(comfyui):
            if target.silent:
                raise CalibQuantError(
                    f"{comfyui}: this ComfyUI ignores {target.title} and would draw noise from such a file: update it, "
                    "choose a newer one, or leave the option off"
                )
            notes.append(
                f"the ComfyUI at {comfyui} cannot load {target.title} layers: the file needs ComfyUI "
                f"{target.core_needed()} or newer"
            )
    return notes
