"""The storage formats, one small module each, all with the functions of :class:`base.Format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CalibQuantError
from . import base, fp8, int8, mxfp8, nvfp4, w4a8
from .base import Codes, FileTensors, Format, Frame, Grid, Layout, Shape, join, turn

# "bf16" means: left in the source dtype, byte for byte. It is a decision of a plan, not a codec.
SOURCE = "bf16"
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(nvfp4.FORMAT, w4a8.FORMAT, w4a8.SIX, mxfp8.FORMAT, fp8.FORMAT),
        *(int8.CONVROT, int8.FORMAT, fp8.UNSCALED),
    )
}


def by_name(name: str) -> Format:
    """The format of that name; CalibQuantError names the known ones."""
    if name not in FORMATS:
        raise CalibQuantError(f"unknown format {name!r}: use one of {', '.join([*FORMATS, SOURCE])}")
    return FORMATS[name]


def changes_shape(fmt: Format, shape: Shape) -> bool:
    """Whether a weight of this shape has another one in the file, from which ComfyUI would detect another model."""
    return fmt.layout(shape)["weight"][1] != shape


def stored(config: Mapping[str, Any], weight: Shape, groups: Shape) -> Format | None:
    """The format of a layer of a finished file by its ``comfy_quant``, ours or a peer's; None: not known here.

    weight, groups: shapes of its stored ``weight`` and ``weight_s_rel`` (() without one), which tell 4- from 6-bit
    codes. ValueError where these do not go together.
    """
    name, size, group = config["format"], config.get("convrot_groupsize", 256), config.get("group_size", w4a8.GROUP)
    four = name == w4a8.FORMAT.name
    if not four and not (name == int8.FORMAT.name and config.get("convrot")):
        return FORMATS.get(name)
    if len(weight) != 2 or (four and len(groups) != 2):
        raise ValueError("a matrix with scales of its groups is wanted" if four else "its weight is no matrix")
    if not all(type(n) is int and n > 0 for n in (size, group)):
        raise ValueError(f"convrot_groupsize {size!r:.20}, group_size {group!r:.20}")
    columns = groups[1] * group if four else weight[1]
    if size not in base.ROTATED or columns % size or not columns:
        raise ValueError(f"{columns} columns in blocks of {size}")
    if not four:
        return int8.ConvRot(size)
    return w4a8.W6A8(size, group) if weight[1] * 4 == columns * 3 else w4a8.W4A8(size, group)


def title(name: str) -> str:
    """The name as people write it: "NVFP4", "FP8", "BF16"."""
    return "BF16" if name == SOURCE else by_name(name).title


__all__ = [
    "FORMATS",
    "SOURCE",
    "Codes",
    "FileTensors",
    "Format",
    "Frame",
    "Grid",
    "Layout",
    "by_name",
    "changes_shape",
    "join",
    "stored",
    "title",
    "turn",
]
