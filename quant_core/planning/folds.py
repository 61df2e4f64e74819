"""What a plan folds, as the plan and the header of a file say it, and what that means for weights and inputs.

Whoever has a plan and a calibration holds the calibration as it was collected; ``seen`` makes of it what the folded
model would have given.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..files.text import counted
from ..models import folding
from ..models.folding import Merge
from ..models.source import Source

KEY = "folds"  # in the provenance of a file
LIMIT = 8  # of exponents: weights times 2**8 stay far inside float16
LORAS = "LoRAs made for the original model do not fit this file; those that were baked in before do"


@dataclass(frozen=True)
class Fold:
    """What one group of channels is divided by: rms(x)**a / rms(w)**b, rounded to powers of two.

    before, after: relative error of its layers' outputs as loaded, on rows that a and b were not chosen by.
    exponents: int8 for each channel, compressed, in base64; "" where nothing helps and all is left as it is.
    """

    a: float
    b: float
    before: float
    after: float
    exponents: str = ""


def packed(exponents: torch.Tensor) -> str:
    return base64.b64encode(zlib.compress(exponents.to(torch.int8).numpy().tobytes(), 9)).decode()


def parse(raw: Any, origin: str, remedy: str = "make the plan again") -> dict[str, Fold]:
    """Folds out of JSON; CalibQuantError names the group that is damaged. None: a plan that knew of none."""
    if not isinstance(raw, dict | None):
        raise CalibQuantError(f"{origin}: its folds are no object: {remedy}")
    folds = {}
    for name, entry in (raw or {}).items():
        try:
            numbers = {key: float(entry[key]) for key in ("a", "b", "before", "after")}
            folds[name] = Fold(**numbers, exponents=str(entry["exponents"]))
            _exponents(folds[name])
        except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as e:
            raise CalibQuantError(f"{origin}: layer {name}: its fold is damaged ({e!r}): {remedy}") from e
    return folds


def to_json(folds: Mapping[str, Fold]) -> dict[str, Any]:
    return {name: asdict(fold) for name, fold in folds.items()}


def merge(source: Source, folds: Mapping[str, Fold], first: Merge | None = None) -> Merge:
    """What folding does to each tensor of the file, after ``first`` (LoRA patches) has been added to it."""
    first = first or {}
    changes = folding.functions(source, factors(source, folds))
    both = {key: _after(first[key], change) for key, change in changes.items() if key in first}
    return {**first, **changes, **both}


def seen(source: Source, folds: Mapping[str, Fold], calibration: Calibration) -> Calibration:
    """The calibration as the folded model would have given it."""
    inputs = folding.input_factors(source, factors(source, folds))
    return calibration.scaled(inputs) if inputs else calibration


def changed(source: Source, folds: Mapping[str, Fold]) -> list[str]:
    """The modules whose weights are not the original's, as the file names them."""
    keys = folding.functions(source, factors(source, folds))
    return sorted({key.rpartition(".")[0] for key in keys})


def reached(source: Source, folds: Mapping[str, Fold]) -> set[str]:
    """The layers of which every input belongs to a group that was tried."""
    known = folding.groups(source) if folds else {}
    parts = [part for name in folds for part in known[name].consumers]
    return {part.module for part in parts if part.stop - part.start == source.shape(part.module)[1]}


def check(source: Source, folds: Mapping[str, Fold]) -> None:
    """CalibQuantError when folds are not of this model."""
    factors(source, folds)


def used(folds: Mapping[str, Fold]) -> dict[str, Fold]:
    """Those that change anything."""
    return {name: fold for name, fold in folds.items() if fold.exponents}


def summary(folds: Mapping[str, Fold]) -> list[str]:
    """A line on all, and one for each layer type; nothing where there are no folds."""
    if not folds:
        return []
    kinds: dict[str, list[Fold]] = {}
    for name, fold in folds.items():
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(fold)
    lines = [f"folded smoothing: {_line(list(folds.values()))}"]
    return lines + [f"  {kind}: {_line(members)}" for kind, members in kinds.items()]


def _line(folds: list[Fold]) -> str:
    before, after = fmean(fold.before for fold in folds), fmean(fold.after for fold in folds)
    chosen = sorted({(fold.a, fold.b) for fold in folds if fold.exponents})
    powers = f", (a, b) {' '.join(f'({a:g}, {b:g})' for a, b in chosen)}" if chosen else ""
    count = sum(bool(fold.exponents) for fold in folds)
    return f"{count} of {counted(len(folds), 'group')}, mean error as loaded {before:.2e} -> {after:.2e}{powers}"


def _after(first: Any, then: Any) -> Any:
    return lambda tensor: then(first(tensor))


def factors(source: Source, folds: Mapping[str, Fold]) -> dict[str, torch.Tensor]:
    """s, float32 [width], of each group that is folded."""
    known, found = folding.groups(source) if folds else {}, {}
    for name, fold in folds.items():
        where = f"{source.path}: layer {source.prefix}{name}"
        if name not in known:
            raise CalibQuantError(
                f"{where}: nothing can be folded into it, as the plan has it: make a plan for this file"
            )
        exponents = _exponents(fold)
        if fold.exponents and len(exponents) != known[name].width:
            raise CalibQuantError(
                f"{where}: the plan folds {len(exponents)} channels, it has {known[name].width}: "
                "make a plan for this file"
            )
        if fold.exponents:
            found[name] = torch.exp2(exponents.float())
    return found


def _exponents(fold: Fold) -> torch.Tensor:
    """int8 [width], empty for none. ValueError where they are damaged."""
    if not all(math.isfinite(number) for number in (fold.a, fold.b, fold.before, fold.after)):
        raise ValueError("a number is not finite")
    if not fold.exponents:
        return torch.empty(0, dtype=torch.int8)
    raw = zlib.decompress(base64.b64decode(fold.exponents, validate=True))
    exponents = torch.from_numpy(np.frombuffer(raw, np.int8).copy())
    if not len(exponents) or int(exponents.abs().max()) > LIMIT:
        raise ValueError(f"exponents beyond {LIMIT}")
    return exponents
