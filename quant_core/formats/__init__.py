"""The storage formats, one small module each, all with the functions of :class:`base.Format`."""

from __future__ import annotations

from ..errors import CalibQuantError
from . import fp8, int8, mxfp8, nvfp4
from .base import Codes, FileTensors, Format, Layout

# "bf16" means: left in the source dtype, byte for byte. It is a decision of a plan, not a codec.
SOURCE = "bf16"
FORMATS: dict[str, Format] = {f.name: f for f in (nvfp4.FORMAT, mxfp8.FORMAT, fp8.FORMAT, int8.FORMAT, fp8.UNSCALED)}


def by_name(name: str) -> Format:
    """The format of that name; CalibQuantError names the known ones."""
    if name not in FORMATS:
        raise CalibQuantError(f"unknown format {name!r}: use one of {', '.join([*FORMATS, SOURCE])}")
    return FORMATS[name]


def title(name: str) -> str:
    """The name as people write it: "NVFP4", "FP8", "BF16"."""
    return "BF16" if name == SOURCE else by_name(name).title


__all__ = ["FORMATS", "SOURCE", "Codes", "FileTensors", "Format", "Layout", "by_name", "title"]
