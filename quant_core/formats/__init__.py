"""The storage formats, one small module each, all with the functions of :class:`base.Format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CalibQuantError
from . import fp8, int8, mxfp8, nvfp4, w4a8
from .base import Codes, FileTensors, Format, Frame, Grid, Layout, join, turn

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


def stored(config: Mapping[str, Any], bits: float = 8.0) -> Format | None:
    """The format of a layer of a finished file by its ``comfy_quant``, ours or a peer's; None: not known here.

    bits: stored per weight, which tells 4- from 6-bit codes.
    """
    size = config.get("convrot_groupsize", 256)
    if config["format"] == int8.FORMAT.name and config.get("convrot"):
        return int8.ConvRot(size)
    if config["format"] == w4a8.FORMAT.name:
        return w4a8.W6A8(size) if bits == 6 else w4a8.W4A8(size)
    return FORMATS.get(config["format"])


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
    "join",
    "stored",
    "title",
    "turn",
]
