"""What each layer sees and does while a model really samples: statistics, sampled rows, and how two add up.

``calibration`` keeps them in a file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CalibQuantError
from . import sensitivity
from .sensitivity import LayerSensitivity

ROWS = 2048  # of input per group
ROWS_MEMORY = "rows_memory"  # in info: bytes that rows of wide layers may take beyond that; see capacities
HELD_OUT = 5  # one run in so many is set aside
UNKNOWN = -1  # the run of a row that a file of version 2 or an unfinished run left


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer; as the file describes them. ``group`` names the layer that holds the rows."""

    group: str
    count: int
    calls: int
    input_mean: torch.Tensor
    input_absmean: torch.Tensor
    input_sqmean: torch.Tensor
    input_amax: torch.Tensor
    output_mean: float
    output_sqmean: float
    output_channel_mean: torch.Tensor
    output_channel_sqmean: torch.Tensor

    @property
    def output_variance(self) -> float:
        """HSWQ's sensitivity: mean over calls of mean(Y^2), minus the squared mean over calls of mean(Y)."""
        return self.output_sqmean - self.output_mean**2

    def scaled(self, factor: torch.Tensor) -> LayerStats:
        """Inputs times ``factor``, float32 [in]; outputs stay what they were."""
        return replace(
            self,
            input_mean=self.input_mean * factor,
            input_absmean=self.input_absmean * factor.abs(),
            input_sqmean=self.input_sqmean * factor.square(),
            input_amax=self.input_amax * factor.abs(),
        )


VECTORS = tuple(f.name for f in fields(LayerStats) if f.type == "torch.Tensor")


@dataclass(frozen=True)
class Rows:
    """A uniform sample without replacement: the rows whose random keys are the largest of all rows seen."""

    rows: torch.Tensor  # bfloat16 [n, in]
    keys: NDArray[np.float64]  # [n], in the order of rows
    runs: NDArray[np.int32]  # [n], places in info["runs"], or UNKNOWN


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers with their provenance (``info``: architecture, source, prompts, seeds, sigmas …)."""

    layers: dict[str, LayerStats] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    sensitivities: dict[str, LayerSensitivity] = field(default_factory=dict)  # of layers where they were measured

    def fingerprint(self) -> str:
        """SHA-256 over what tells two calibrations apart: provenance, statistics, which rows, which sensitivities."""
        digest = hashlib.sha256(json.dumps(self.info, sort_keys=True, default=str).encode())
        for name, stats in sorted(self.layers.items()):
            digest.update(f"{name} {stats.count} {name in self.sensitivities}".encode())
            digest.update(stats.input_sqmean.numpy().tobytes() + stats.input_amax.numpy().tobytes())
        for name in sorted(self.rows):
            digest.update(name.encode() + self.rows[name].keys.tobytes())
        return digest.hexdigest()

    def rows_of(self, layer: str) -> torch.Tensor:
        """Sampled input rows of a layer, bfloat16 [n, in]."""
        return self.rows[self.layers[layer].group].rows

    def held_out(self, group: str) -> tuple[torch.Tensor, int]:
        """Which rows of a group are set aside for judging, bool [n], and of how many runs they are; none of one run.

        Which runs depends on their names alone, not on the order in which files were merged; equal names are one run.
        """
        runs: dict[str, list[int]] = {}
        for place, name in enumerate(self.info.get("runs", [])):
            runs.setdefault(name, []).append(place)
        of = self.rows[group].runs
        seen = [name for name, places in runs.items() if np.isin(of, places).any()]
        drawn = sorted(seen, key=lambda name: (zlib.crc32(name.encode()), name))[: max(1, len(seen) // HELD_OUT)]
        if len(seen) < 2:
            drawn = []
        places = [place for name in drawn for place in runs[name]]
        return torch.from_numpy(np.isin(of, places)), len(drawn)

    def scaled(self, factors: Mapping[str, torch.Tensor]) -> Calibration:
        """As if the inputs of some layers had been ``factors``, float32 [in] by layer, times what they were.

        Rows are multiplied when they are asked for. Layers that shared an input and got different factors no longer
        share it. Statistics of outputs stay what they were; sensitivities are of the model as it was, and left out.
        """
        layers, origins, names = {}, {}, dict[tuple[str, bytes], str]()
        for name, stats in self.layers.items():
            factor = factors.get(name)
            key = stats.group, b"" if factor is None else factor.numpy().tobytes()
            group = names.setdefault(key, name)
            origins[group] = stats.group, factor
            layers[name] = replace(stats if factor is None else stats.scaled(factor), group=group)
        known = {group: origin for group, origin in origins.items() if origin[0] in self.rows}
        return Calibration(layers, _ScaledRows(self.rows, known), self.info)


class _ScaledRows(Mapping[str, Rows]):
    """Rows times a factor, by group; made anew at each look, so that no second copy stays in memory."""

    def __init__(self, rows: Mapping[str, Rows], origins: Mapping[str, tuple[str, torch.Tensor | None]]) -> None:
        self._rows, self._origins = rows, origins

    def __getitem__(self, group: str) -> Rows:
        origin, factor = self._origins[group]
        sample = self._rows[origin]
        if factor is None:
            return sample
        rows = sample.rows
        return Rows((rows.float() * factor).to(rows.dtype), sample.keys, sample.runs)

    def __contains__(self, group: object) -> bool:
        return group in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)


def capacities(widths: Mapping[str, int], rows: int, memory: int) -> dict[str, int]:
    """How many input rows each group of layers keeps: ``rows``; with ``memory`` (bytes, of all groups together) up to
    as many as it is wide, all wide ones the same share of their width.

    GPTQ gains by rows up to the width and little beyond (``benchmarks/rows.py``), and so many in bfloat16 take half
    the room of the float32 matrix E[x x^T]. Unlike that they know the run they are from, so that some can judge.
    """
    wide = np.array(list(widths.values()), np.float64)

    def kept(share: float) -> NDArray[np.float64]:
        return np.maximum(rows, np.floor(share * wide))

    def fit(share: float) -> bool:
        return bool(2 * (wide * kept(share)).sum() <= memory)

    share, step = (1.0, 0.0) if fit(1.0) else (0.0, 0.5)
    while step > 1e-6:
        share, step = share + step * fit(share + step), step / 2
    return {name: int(count) for name, count in zip(widths, kept(share), strict=True)}


def merge(a: Calibration, b: Calibration, rows: int = ROWS) -> Calibration:
    """Both as if calibrated in one go: means weighted by rows or calls, amax by maximum, rows by their keys.

    CalibQuantError when the two are of different models.
    """
    for name in ("architecture", "source_fingerprint"):
        if a.info.get(name) != b.info.get(name):
            raise CalibQuantError(
                f"calibrations of different models cannot be merged: {name} {a.info.get(name)} and {b.info.get(name)}"
            )
    layers = {name: _merge_stats(a.layers.get(name), b.layers.get(name)) for name in {**a.layers, **b.layers}}
    memory = max(c.info.get(ROWS_MEMORY, 0) for c in (a, b))
    room = capacities({name: len(layers[name].input_amax) for name in {**a.rows, **b.rows}}, rows, memory)
    merged = {name: _merge_rows(a, b, name, capacity) for name, capacity in room.items()}
    info = {**b.info, **a.info}
    lists = {name for name, value in a.info.items() if isinstance(value, list) and isinstance(b.info.get(name), list)}
    info |= {name: a.info[name] + [v for v in b.info[name] if v not in a.info[name]] for name in lists}
    info |= {"rows": rows, **({ROWS_MEMORY: memory} if memory else {})}
    info["runs"] = a.info.get("runs", []) + b.info.get("runs", [])
    info["sigmas"] = dict(Counter(a.info.get("sigmas", {})) + Counter(b.info.get("sigmas", {})))
    for name in ("cond_rows", "uncond_rows"):
        info[name] = a.info.get(name, 0) + b.info.get(name, 0)
    return Calibration(layers, merged, info, merge_sensitivities(a.sensitivities, b.sensitivities))


def merge_sensitivities(
    a: Mapping[str, LayerSensitivity], b: Mapping[str, LayerSensitivity]
) -> dict[str, LayerSensitivity]:
    both = {name: sensitivity.merge(a[name], b[name]) for name in a if name in b}
    return {**a, **b, **both}


def _merge_stats(a: LayerStats | None, b: LayerStats | None) -> LayerStats:
    if a is None or b is None:
        return a or b  # type: ignore[return-value]
    count, calls = a.count + b.count, a.calls + b.calls

    def by(weight_a: int, weight_b: int, name: str) -> Any:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            return ((x.double() * weight_a + y.double() * weight_b) / (weight_a + weight_b)).float()
        return (x * weight_a + y * weight_b) / (weight_a + weight_b)

    means = {name: by(a.count, b.count, name) for name in VECTORS if name != "input_amax"}
    means |= {name: by(a.calls, b.calls, name) for name in ("output_mean", "output_sqmean")}
    return LayerStats(
        group=a.group, count=count, calls=calls, input_amax=torch.maximum(a.input_amax, b.input_amax), **means
    )


def _merge_rows(a: Calibration, b: Calibration, name: str, capacity: int) -> Rows:
    """The largest keys of both. Below the smallest key of a sample that had to leave rows out, nothing is known of
    that one's rows, so none of the other's may stay: they would be too many, if their numbers of rows differ.
    """
    samples = [(c.rows[name], c.layers[name].count) for c in (a, b) if name in c.rows]
    first = len(a.info.get("runs", []))  # b's runs come after a's
    runs = [
        np.where(c.rows[name].runs < 0, UNKNOWN, c.rows[name].runs + first * (c is b)) for c in (a, b) if name in c.rows
    ]
    keys, of = np.concatenate([sample.keys for sample, _ in samples]), np.concatenate(runs)
    # A run that was cancelled and then repeated has the same keys again: its rows of before go.
    keys[(of == UNKNOWN) & np.isin(keys, keys[of != UNKNOWN])] = -1.0
    floor = max((sample.keys.min() for sample, seen in samples if 0 < len(sample.keys) != seen), default=0.0)
    order = np.argsort(-keys, kind="stable")[: min(capacity, int((keys >= floor).sum()))]
    rows = torch.cat([sample.rows for sample, _ in samples])[torch.from_numpy(order)]
    return Rows(rows, keys[order], of[order].astype(np.int32))
