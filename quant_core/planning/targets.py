"""What a file asks of the machine that loads it: which ComfyUI reads it, and on which cards it runs fast.

One table. Whether the ComfyUI at hand can read a file is asked of its own source text, not of its version number.
Cards are those that comfy-kitchen's layouts name as their least compute capability; elsewhere the loader dequantizes:
the file is as small, but no faster than 16 bit.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..locate import find_comfyui
from ..models.architectures import part_of
from ..models.source import Source
from ..rounding import smoothing, split
from ..rounding.layerplan import LayerPlan
from . import folds
from .plan import Plan

LEAST_CORE = "0.29"  # that this pack supports at all


@dataclass(frozen=True)
class Target:
    """What one format, or one extra tensor, asks for.

    bits: stored per weight, with scales. capability: the least of a GPU whose kernels multiply in this format, "" for
    none. always: layers round their inputs on every device, because the loader leaves that to comfy-kitchen's layer
    ("quantize_input" is false in ``comfy/quant_ops.py``), whose functions without a kernel do the same; of all other
    formats it rounds no input on a card below ``capability`` (``comfy/ops.py``: "emulated ops"). core: the first
    ComfyUI that reads it. word: what its ``comfy/quant_ops.py`` then holds. kitchen: the first comfy-kitchen whose
    kernels do, and a module that it has. silent: an older ComfyUI loads the file without an error, and draws noise.
    lora: what a LoRA by an ordinary loader does to the final latent's error (benchmarks/lora_after.py).
    """

    title: str
    bits: float = 0.0
    capability: str = ""
    cards: str = ""
    core: str = LEAST_CORE
    word: str = ""
    kitchen: tuple[str, str] | None = None
    silent: bool = False
    always: bool = False
    lora: str = ""

    def missing(self, comfyui: Path) -> bool:
        """Whether the ComfyUI in this folder cannot read it (with the comfy-kitchen installed here)."""
        loader = comfyui / "comfy" / "quant_ops.py"
        if self.word and not (loader.is_file() and self.word in loader.read_text(encoding="utf-8")):
            return True
        return self.kitchen is not None and importlib.util.find_spec(self.kitchen[1]) is None

    def core_needed(self) -> str:
        return self.core + (f" with comfy-kitchen {self.kitchen[0]}" if self.kitchen else "")


_W4A8 = {"capability": "8.0", "cards": "RTX 30 and newer", "core": "0.31", "word": '"asym_w4a8_int8"', "always": True}
TARGETS: dict[str, Target] = {
    "nvfp4": Target("NVFP4", 4.5, "10.0", "RTX 50", lora=".0004 -> .022"),
    "asym_w4a8_int8": Target("W4A8", 4.5, **_W4A8, lora=".0003 -> .005"),
    "asym_w6a8_int8": Target("W6A8", 6.5, **_W4A8, kitchen=("0.2.38", "comfy_kitchen.tensor.w4a8_packed")),
    "mxfp8": Target("MXFP8", 8.25, "10.0", "RTX 50", lora=".0001 -> .001"),
    "float8_e4m3fn": Target("FP8", 8.0, "8.9", "RTX 40 and newer with a calibration", lora=".0001 -> .0007"),
    "int8_convrot": Target("INT8 ConvRot", 8.0, "7.5", "RTX 20 and newer", always=True, lora="1e-5 -> 5e-5"),
    "int8_tensorwise": Target("INT8", 8.0, "7.5", "RTX 20 and newer", always=True, lora="1e-5 -> 5e-5"),
    "float8_e4m3fn_unscaled": Target("FP8 without scale", 8.0),
}
# Cards, newest first -> the least compute capability of theirs. "any": of nothing newer than the oldest is anything
# taken for granted as to speed, and inputs count as rounded wherever some card rounds them.
GPUS = {"blackwell": "10.0", "hopper": "9.0", "ada": "8.9", "ampere": "8.0", "turing": "7.5", "any": ""}
ANY, NEWEST = "any", next(iter(GPUS))
ENCODERS = "ComfyUI multiplies text encoders in 16 bit on every card: less memory, no more speed"
NATIVE, EMULATED, WIDE = "native", "emulated", "16-bit"
SMOOTHED = Target(smoothing.KEY, core="0.31", word=f'"{smoothing.KEY}"', silent=True)


def needs(plan: Plan) -> list[Target]:
    """What a file of this plan needs that not every supported ComfyUI has."""
    found = [TARGETS[fmt] for fmt in plan.count() if fmt in TARGETS]
    found += [SMOOTHED] if any(entry.pre_quant_scale for entry in plan.layers.values()) else []
    return [target for target in found if target.word]


def core_needed(plan: Plan) -> str:
    """The first ComfyUI that reads a file of this plan, for headers and reports: "0.31"."""
    return max([LEAST_CORE, *(target.core_needed() for target in needs(plan))])


def this_gpu() -> str:
    """The card of this machine; "any" without one of NVIDIA's, or with one older than all of the table."""
    if torch.version.hip or not torch.cuda.is_available():
        return ANY
    have = torch.cuda.get_device_capability()
    return next((name for name, least in GPUS.items() if least and have >= _version(least)), ANY)


def speed(entry: LayerPlan, gpu: str) -> str:
    """How a layer is multiplied on this card: natively in its format, unpacked to 16 bit every time, or as it is."""
    target = TARGETS.get(entry.format)
    if target is None or not target.capability:
        return WIDE
    return NATIVE if not entry.full_precision and _has_kernels(target, gpu) else EMULATED


def rounds_inputs(entry: LayerPlan, gpu: str) -> bool:
    """Whether the loader rounds this layer's inputs on this card."""
    target = TARGETS.get(entry.format)
    if target is None or not target.capability or entry.full_precision:
        return False
    return target.always or gpu == ANY or _has_kernels(target, gpu)


def _has_kernels(target: Target, gpu: str) -> bool:
    return _version(GPUS[gpu] or min(filter(None, GPUS.values()), key=_version)) >= _version(target.capability)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def words(plan: Plan, source: Source | None = None) -> list[str]:
    """What to expect of a file of this plan: its speed on the card that it is for, the core it needs, its LoRAs.

    source: what it is made of, so that layers count by their work.
    """
    if part_of(plan.architecture) == "te":
        return [ENCODERS, f"needs ComfyUI {core_needed(plan)} or newer"]
    speeds = [_speeds(plan, source) if plan.gpu else _cards(plan)] if plan.quantized() else []
    return [*speeds, f"needs ComfyUI {core_needed(plan)} or newer", *_loras(plan)]


def fast_on(plan: Plan) -> str:
    """The cards that multiply every quantized layer natively: "fast on RTX 30 and newer"."""
    entries = [entry for entry in plan.quantized().values() if speed(entry, NEWEST) == NATIVE]
    newest = max((TARGETS[entry.format] for entry in entries), key=lambda t: _version(t.capability), default=None)
    if newest is None:
        return "no faster than 16 bit"
    return f"fast on {newest.cards.removesuffix(' with a calibration')}"


def multiplications(source: Source, calibration: Calibration | None, layer: str) -> float:
    """Of one layer while the calibration ran; without one of one row."""
    seen = calibration.layers.get(source.short(layer)) if calibration else None
    return float(math.prod(source.shape(layer))) * (seen.count if seen else 1)


def _speeds(plan: Plan, source: Source | None) -> str:
    """Which share of the linear work runs how."""
    calibration = plan.seen() if plan.seen else None
    work, of = dict.fromkeys(plan.layers, 1.0), "layers"
    if source is not None:
        work = {layer: multiplications(source, calibration, layer) for layer in plan.layers}
        of = "linear work" if calibration else "linear weights"
    total = sum(work.values()) or 1.0
    shares = Counter[str]()
    for layer, entry in plan.layers.items():
        shares[speed(entry, plan.gpu)] += work[layer] / total
    how = {NATIVE: "in native kernels", EMULATED: "emulated", WIDE: "in 16 bit"}
    told = ", ".join(f"{100 * shares[kind]:.0f} % {words}" for kind, words in how.items() if shares[kind])
    unpacked = "; emulated ones are unpacked to 16 bit at every step: small, but no faster" * bool(shares[EMULATED])
    return f"on {'any card' if plan.gpu == ANY else plan.gpu.capitalize()}: of the {of} {told}{unpacked}"


def _cards(plan: Plan) -> str:
    """Where a file that is for no card in particular is fast."""
    running = {entry.format for entry in plan.quantized().values() if not entry.full_precision}
    fast = [f"{target.title} on {target.cards}" for fmt, target in TARGETS.items() if fmt in running and target.cards]
    elsewhere = "unpacked to 16 bit at every step: small, but no faster"
    return f"fast: {', '.join(fast)}; elsewhere {elsewhere}" if fast else f"on every card {elsewhere}"


def _loras(plan: Plan) -> list[str]:
    """What LoRAs do to the file."""
    entries = plan.quantized()
    if folds.used(plan.folds) or any(entry.pre_quant_scale for entry in entries.values()):
        return [folds.LORAS]
    if not entries:
        return []
    costs = {fmt: f"{TARGETS[fmt].title} {TARGETS[fmt].lora}" for fmt in plan.count() if fmt in TARGETS}
    known = [costs[fmt] for fmt in costs if TARGETS[fmt].lora]
    error = f" (final latent's error, demo model: {', '.join(known)})" * bool(known)
    int8 = {fmt for fmt in costs if fmt in split.WITHOUT}
    if int8 == set(costs):
        return [f"LoRAs: bake them in, or load them as usual{error}; newer ComfyUI loses a bypass LoRA on INT8 layers"]
    after = "after Load Split Model" if plan.ranks() else "(Load LoRA (Bypass, Model Only))"
    lost = "; on INT8 layers newer ComfyUI loses it" * bool(int8)
    anew = f"an ordinary loader rounds anew what it touches{error}"
    return [f"LoRAs: bake them in, or use a bypass loader {after}{lost}; {anew}"]


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
