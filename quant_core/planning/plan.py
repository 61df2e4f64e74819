"""What was decided for each layer, why, and exactly how large the file will be."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..files.text import parse_json, read_text, write_text
from ..formats import FORMATS, SOURCE
from ..rounding.layerplan import LayerPlan
from . import folds
from .folds import Fold

if TYPE_CHECKING:
    from .budget import Asked

FORMAT_VERSION = 1
ROUNDINGS = ("", "hswq")
LEAST_SCALE = 2.0**-126  # of activations: loaders divide by it


@dataclass(frozen=True)
class Plan:
    """One decision per 2-D weight of the chosen parts, in the order of the source file.

    ``size`` is the exact number of bytes of the output file, header included, for the source the plan was made
    for (0 in a plan written by hand).
    """

    architecture: str
    recipe: str
    source: str
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    size: int = 0
    calibration: dict[str, Any] | None = None  # summary of the calibration the plan was made with
    folds: dict[str, Fold] = field(default_factory=dict)  # what changes the scale of channels, by group
    gpu: str = ""  # the card that it was made for, a key of targets.GPUS; "": none in particular
    parts: tuple[str, ...] = ()  # of a checkpoint, as they were chosen; (): the diffusion model alone
    predicted: dict[str, Any] | None = None  # what the allocation expects (budget.py), with its controls and curve
    seen: Callable[[], Calibration] | None = field(default=None, compare=False, repr=False)  # itself, while in memory
    path: Path | None = field(default=None, compare=False, repr=False)  # of the source, while in memory
    asked: Asked | None = field(default=None, compare=False, repr=False)  # what a budget's was made of, in memory too

    def count(self) -> dict[str, int]:
        """Layers per format, in the order of the format table, "bf16" last."""
        counts = Counter(entry.format for entry in self.layers.values())
        return {name: counts[name] for name in (*FORMATS, SOURCE) if counts[name]}

    def quantized(self) -> dict[str, LayerPlan]:
        return {name: entry for name, entry in self.layers.items() if entry.format != SOURCE}

    def ranks(self) -> dict[str, int]:
        """The layers that have a branch."""
        return {name: entry.rank for name, entry in self.quantized().items() if entry.rank}

    def to_json(self) -> str:
        entries = asdict(replace(self, seen=None, asked=None))
        del entries["seen"], entries["path"], entries["asked"]
        return json.dumps({"format_version": FORMAT_VERSION, **entries}, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> None:
        write_text(path, self.to_json(), overwrite)


def from_json(text: str, origin: str = "plan") -> Plan:
    """Parse and check a plan; CalibQuantError names what is wrong with it."""
    raw = parse_json(text, f"{origin}: is no plan", "make the plan again")
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        version = raw.get("format_version") if isinstance(raw, dict) else None
        raise CalibQuantError(f"{origin}: plan format version {version} is not {FORMAT_VERSION}: make the plan again")
    try:
        layers = {name: _layer(origin, name, entry) for name, entry in raw["layers"].items()}
        return Plan(
            str(raw["architecture"]),
            str(raw["recipe"]),
            str(raw["source"]),
            layers,
            int(raw["size"]),
            _object(raw, "calibration"),
            folds.parse(raw.get("folds"), origin),
            str(raw.get("gpu", "")),
            tuple(map(str, raw.get("parts", ()))),
            _object(raw, "predicted"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CalibQuantError(f"{origin}: is no plan of this tool ({e!r}): make the plan again") from e


def _object(raw: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = raw.get(name)
    if not isinstance(value, dict | None):
        raise TypeError(f"{name} must be an object")
    return value


def load(path: str | os.PathLike[str]) -> Plan:
    return from_json(read_text(path), str(path))


def _layer(origin: str, name: str, entry: dict[str, Any]) -> LayerPlan:
    fmt = entry["format"]
    if fmt != SOURCE and fmt not in FORMATS:
        raise CalibQuantError(f"{origin}: layer {name}: unknown format {fmt!r}: use {', '.join([*FORMATS, SOURCE])}")
    rounding = entry.get("rounding", "")
    if rounding not in ROUNDINGS:
        raise CalibQuantError(f"{origin}: layer {name}: unknown rounding {rounding!r}: use {', '.join(ROUNDINGS)}")
    scale = entry.get("input_scale")
    check_input_scale(scale, f"{origin}: layer {name}")
    return LayerPlan(
        fmt,
        str(entry.get("reason", "")),
        bool(entry.get("full_precision", False)),
        None if scale is None else float(scale),
        rounding,
        bool(entry.get("pre_quant_scale", False)),
        _rank(entry.get("rank", 0), f"{origin}: layer {name}"),
    )


def _rank(rank: object, where: str) -> int:
    if type(rank) is not int or rank < 0:
        raise CalibQuantError(f"{where}: rank {rank!s:.40} is no whole number from 0 up: make the plan again")
    return rank


def check_input_scale(scale: object, where: str) -> None:
    """CalibQuantError for a scale of activations that is no positive number which float32 holds, with its inverse."""
    if scale is None:
        return
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        raise CalibQuantError(
            f"{where}: input_scale {scale!s:.40} is not a number from {LEAST_SCALE:.2g} to {1 / LEAST_SCALE:.2g}: "
            "make the plan again"
        )
