"""Which layer a LoRA's tensors are for, in the spellings that trainers use. Headers only, no torch.

    diffusion_model.X.lora_down.weight / .lora_up.weight     X as ComfyUI names the layer; also .lora_A / .lora_B
    transformer.Y.lora_A.weight / .lora_B.weight             Y as diffusers names it, with or without that prefix
    lora_unet_X_with_underscores.lora_down.weight / …        kohya, of either kind of name

A layer that ComfyUI joins (q, k and v become one) gets its parts' factors side by side, each for its own rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CalibQuantError
from ..files.header import TensorEntry
from .layouts import LAYOUTS
from .lora import PREFIX
from .modelfile import FLOATS

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
BLOCKS = 100  # numbers that are tried for a block
ENDS = {  # what follows the layer's name -> what it is
    **{f".lora_{end}.weight": "up" for end in ("up", "B", "B.default")},
    **{f".lora_{end}.weight": "down" for end in ("down", "A", "A.default")},
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".alpha": "alpha",
}
PREFIXES = ("base_model.model.", PREFIX, "transformer.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT = ("lora_te", "text_encoder")  # of a text encoder: kept under their own names
REMEDY = (
    "load it with the stock bypass loader after Load Split Model, or bake it in before quantizing with Save Quantized "
    "Model"
)


@dataclass(frozen=True)
class Part:
    """One pair of factors of a LoRA file for a layer, or for one of ``of`` parts that ComfyUI joins to it.

    up, down and alpha are keys of the file, alpha "" where there is none. layer: ComfyUI's name, without prefix;
    of a text encoder's or any other model's the file's own name, which begins with none of ours.
    """

    layer: str
    up: str
    down: str
    alpha: str = ""
    index: int = 0
    of: int = 1


def parts(path: Path, entries: Mapping[str, TensorEntry], known: Collection[str]) -> list[Part]:
    """The pairs of factors in a LoRA file, for a model of which some layers are known.

    CalibQuantError for a tensor that is no factor, or of a layer whose name is in none of the spellings.
    """
    spelled, found = _spellings(known), {}
    for key, entry in entries.items():
        name, what = _split(path, key)
        if entry.dtype not in FLOATS or (what == "alpha" and math.prod(entry.shape) != 1):
            raise _refused(path, key, f"is {entry.dtype} {list(entry.shape)}, no factor")
        found.setdefault(name, {})[what] = key
    result = []
    for name, keys in found.items():
        if not {"up", "down"} <= keys.keys():
            raise _refused(path, next(iter(keys.values())), "has no counterpart, up and down")
        layer, index, of = _place(path, name, keys["up"], spelled)
        result.append(Part(layer, keys["up"], keys["down"], keys.get("alpha", ""), index, of))
    return result


def _split(path: Path, key: str) -> tuple[str, str]:
    for end, what in ENDS.items():
        if key.endswith(end):
            return key.removesuffix(end), what
    kind = next((kind for kind, mark in _OTHERS.items() if mark in key), "no LoRA's factor")
    raise _refused(path, key, f"is {kind}, which cannot be put beside another LoRA")


_OTHERS = {"DoRA": "dora_scale", "LoHa": ".hada_", "LoKr": ".lokr_", "a change of weights": ".diff"}


def _place(path: Path, name: str, key: str, spelled: Mapping[str, tuple[str, int, int]]) -> tuple[str, int, int]:
    if name.startswith(TEXT):
        return name, 0, 1
    bare = name
    for prefix in PREFIXES:
        bare = bare.removeprefix(prefix)
    found = spelled.get(_squashed(bare))
    if found is None and name.startswith(PREFIX):  # ComfyUI's own name by convention, of a layer we know nothing of
        return name.removeprefix(PREFIX), 0, 1
    if found is None:
        raise _refused(path, key, "names no layer of this model in a spelling that is known here")
    return found


def _refused(path: Path, key: str, problem: str) -> CalibQuantError:
    return CalibQuantError(f"{path}: {key} {problem}: {REMEDY}")


def _squashed(name: str) -> str:
    return name.replace(".", "_")


def _spellings(known: Collection[str]) -> dict[str, tuple[str, int, int]]:
    """Every spelling, with underscores for dots, of layers like the known ones -> (layer, which part, of how many)."""
    spelled = {}
    for native, stored in _rows(known):
        for i in range(BLOCKS) if "*" in native else [0]:
            layer, names = (text.replace("*", str(i)) for text in (native, stored))
            for index, name in enumerate(names.split()):
                spelled.setdefault(_squashed(name), (layer, index, len(names.split())))
    return spelled


def _rows(known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Layers like the known ones in other blocks, under their own names, then under those of diffusers' layouts."""
    yield from ((name, name) for name in sorted({_NUMBER.sub("*", layer, count=1) for layer in known}))
    kinds = {_NUMBER.sub("*", layer) for layer in known}
    tables = [layout.table(_unet_keys(known)) for layout in LAYOUTS]
    alike = [len(kinds.intersection(_NUMBER.sub("*", native) for native in table)) for table in tables]
    for i in sorted(range(len(tables)), key=lambda i: -alike[i]):  # families share a few names: the likest comes first
        yield from ((native, stored) for native, stored in tables[i].items() if alike[i] and "[" not in stored)


def _unet_keys(known: Collection[str]) -> list[str]:
    """As much of a diffusers UNet's keys as its table counts: 4 levels of 2 blocks in SD 1.x and 2.x, 3 in SDXL."""
    levels = 4 if any(re.match(r"(in|out)put_blocks\.(9|1\d)\.", layer) for layer in known) else 3
    return [f"down_blocks.{level}.resnets.{i}.norm1.weight" for level in range(levels) for i in range(2)]
