"""What each layer sees and does while a model really samples: collected, stored, merged.

One safetensors file holds it. Per layer ``L`` (named without the checkpoint's prefix): ``L.input_mean``,
``L.input_absmean``, ``L.input_sqmean``, ``L.input_amax`` (float32 [in]), ``L.output_mean``, ``L.output_sqmean``
(float64 scalars; HSWQ's output variance is sqmean - mean**2), ``L.output_channel_mean``,
``L.output_channel_sqmean`` (float32 [out]), ``L.count`` (rows seen) and ``L.calls`` (int64). Layers that see one
tensor share a uniform sample of its rows: ``G.rows`` (bfloat16 [<= N, in]), ``G.row_keys`` (float64) and ``G.row_runs``
(int32, the run each row is from, a place in the header's ``runs``), where G is the group's first layer; the header says
which layer belongs to which G. Where sensitivities were measured (``sensitivity``): ``L.sens_inputs`` (bfloat16
[n, in]; left out where they are those of G), ``L.sens_gradients`` (bfloat16 [n, out]) and ``L.sens_sums`` (bfloat16
[m, out]), or ``L.sens_gain`` (float64).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CalibQuantError, printable
from ..files.checkpoint import Checkpoint, TensorSpec, Writer
from ..files.text import counted, parse_json
from . import sensitivity
from .sensitivity import LayerSensitivity

FORMAT_VERSION = 4  # 1 had no input_mean, 2 no row_runs, 3 no sensitivities
READABLE = (2, 3, 4)
METADATA_KEY = "calibquant_calibration"
POINTS = "sensitivity_points"  # in info: which runs and sigmas sensitivities were measured at
ROWS = 2048  # of input per group
ROWS_MEMORY = "rows_memory"  # in info: bytes that rows of wide layers may take beyond that; see capacities
HELD_OUT = 5  # one run in so many is set aside
UNKNOWN = -1  # the run of a row that a file of version 2 or an unfinished run left


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer; see the module's description. ``group`` names the layer that holds the rows."""

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


_VECTORS = tuple(f.name for f in fields(LayerStats) if f.type == "torch.Tensor")


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
        return replace(sample, rows=(sample.rows.float() * factor).to(sample.rows.dtype))

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
    room = capacities({name: sample.rows.shape[1] for name, sample in {**a.rows, **b.rows}.items()}, rows, memory)
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

    means = {name: by(a.count, b.count, name) for name in _VECTORS if name != "input_amax"}
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


def save(calibration: Calibration, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write ``*.calibration.safetensors`` (any ``*.safetensors`` name), atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, stats in calibration.layers.items():
        tensors |= {f"{name}.{key}": getattr(stats, key) for key in _VECTORS}
        tensors |= {f"{name}.{key}": torch.tensor(getattr(stats, key)) for key in ("count", "calls")}
        scalars = ("output_mean", "output_sqmean")
        tensors |= {f"{name}.{key}": torch.tensor(getattr(stats, key), dtype=torch.float64) for key in scalars}
    for name, sample in calibration.rows.items():
        tensors |= {f"{name}.rows": sample.rows, f"{name}.row_keys": torch.from_numpy(sample.keys)}
        tensors[f"{name}.row_runs"] = torch.from_numpy(sample.runs)
    groups = {name: stats.group for name, stats in calibration.layers.items()}
    tensors |= _sensitivity_tensors(calibration.sensitivities, groups)
    info = {**calibration.info, "format_version": FORMAT_VERSION, "groups": groups}
    metadata = {METADATA_KEY: json.dumps(info, ensure_ascii=False)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Writer(path, specs, metadata, overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _sensitivity_tensors(known: Mapping[str, LayerSensitivity], groups: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in known.items():
        leader = known.get(groups[name])
        if groups[name] == name or leader is None or not torch.equal(stored.inputs, leader.inputs):
            tensors[f"{name}.sens_inputs"] = stored.inputs
        if stored.gradients is None or stored.sums is None:
            tensors[f"{name}.sens_gain"] = torch.tensor(stored.gain, dtype=torch.float64)
        else:
            tensors |= {f"{name}.sens_gradients": stored.gradients, f"{name}.sens_sums": stored.sums}
    return tensors


def load(path: str | os.PathLike[str]) -> Calibration:
    """Read and check a calibration file; CalibQuantError when it is none, or names the layer that is damaged."""
    with Checkpoint(path) as file:
        problem, remedy = f"{file.path}: is no calibration of this tool", "calibrate again"
        info = parse_json(file.metadata.get(METADATA_KEY, "null"), problem, remedy)
        info = {k: v for k, v in info.items() if v is not None} if isinstance(info, dict) else info
        version = info.get("format_version") if isinstance(info, dict) else None
        if isinstance(version, int) and version not in READABLE:
            raise CalibQuantError(
                f"{file.path}: is a calibration of format version {version}, not {FORMAT_VERSION}: {remedy}"
            )
        try:
            groups = _check_info(info)
            layers = {name: _load_stats(file, name, group) for name, group in groups.items()}
            runs = len(info.get("runs", []))
            rows = {name: _load_rows(file, name, layers, runs) for name in sorted(set(groups.values()))}
            known = _load_sensitivities(file, layers)
        except _DamageError as e:
            raise CalibQuantError(f"{problem}: {e}: {remedy}") from e
    sampled = {name: sample for name, sample in rows.items() if sample is not None}
    return Calibration(layers, sampled, info, known)


class _DamageError(Exception):
    """What is wrong with a calibration file."""


# What the header says beside the groups: name -> kind. All may be missing; what else is there is carried along.
_INFO = {
    "architecture": str, "source_file": str, "source_fingerprint": str, "rows": int, ROWS_MEMORY: int, "cond_rows": int,
    "uncond_rows": int, "runs": list, "sigmas": dict, POINTS: list,
}  # fmt: skip


def _check_info(info: Any) -> dict[str, str]:
    """The groups, taken out of the header's JSON once all of it is of the right kind."""
    if not isinstance(info, dict) or info.get("format_version") not in READABLE:
        raise _DamageError("its header has no format version")
    for name, kind in _INFO.items():
        value = info.get(name, kind())
        if type(value) is not kind or (kind is int and value < 0):
            raise _DamageError(f"{name} in its header is {value!r:.40}")
    if not all(type(n) is int and n >= 0 and _is_number(sigma) for sigma, n in info.get("sigmas", {}).items()):
        raise _DamageError("sigmas in its header must be counts of numbers")
    if not all(isinstance(run, str) for run in info.get("runs", [])):
        raise _DamageError("runs in its header must be names")
    if not all(isinstance(point, str) for point in info.get(POINTS, [])):
        raise _DamageError(f"{POINTS} in its header must be names")
    groups = info.pop("groups", None)
    if not isinstance(groups, dict) or not all(isinstance(g, str) and g in groups for g in groups.values()):
        raise _DamageError("its header does not say which layers share an input")
    return groups


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def _load_stats(file: Checkpoint, name: str, group: str) -> LayerStats:
    vectors = {key: _read(file, f"{name}.{key}", "F32", 1) for key in _VECTORS}
    count, calls = (int(_read(file, f"{name}.{key}", "I64", 0)) for key in ("count", "calls"))
    mean, sqmean = (float(_read(file, f"{name}.{key}", "F64", 0)) for key in ("output_mean", "output_sqmean"))
    stats = LayerStats(group, count, calls, output_mean=mean, output_sqmean=sqmean, **vectors)
    for side in ("input_", "output_channel_"):
        if len({len(vector) for key, vector in vectors.items() if key.startswith(side)}) != 1:
            raise _DamageError(f"layer {name}: its {side}… tensors differ in length")
    for key in ("input_absmean", "input_sqmean", "input_amax", "output_channel_sqmean"):
        if (vectors[key] < 0).any():
            raise _DamageError(f"layer {name}: {key} has negative values")
    if min(count, calls) < 1 or sqmean < 0:
        raise _DamageError(f"layer {name}: {count} rows of {calls} calls with a mean square of {sqmean:g}")
    return stats


def _load_rows(file: Checkpoint, group: str, layers: Mapping[str, LayerStats], runs: int) -> Rows | None:
    """The rows that the layers of one group share; None where none were sampled."""
    if f"{group}.rows" not in file.entries:
        return None
    rows, keys = _read(file, f"{group}.rows", "BF16", 2), _read(file, f"{group}.row_keys", "F64", 1)
    if len(rows) != len(keys):
        raise _DamageError(f"layer {group}: {len(rows)} rows and {len(keys)} keys of rows")
    for name, stats in layers.items():
        if stats.group == group and len(stats.input_amax) != rows.shape[1]:
            raise _DamageError(
                f"layer {name}: saw inputs of {len(stats.input_amax)} channels, its rows have {rows.shape[1]}"
            )
    if f"{group}.row_runs" not in file.entries:
        return Rows(rows, keys.numpy(), np.full(len(keys), UNKNOWN, np.int32))
    of = _read(file, f"{group}.row_runs", "I32", 1).numpy()
    if len(of) != len(keys) or not ((of >= UNKNOWN) & (of < runs)).all():
        raise _DamageError(f"layer {group}: its rows name runs that are not in the header")
    return Rows(rows, keys.numpy(), of)


def _read(file: Checkpoint, key: str, dtype: str, rank: int) -> torch.Tensor:
    """A finite tensor of this dtype and rank, not empty (but for rows: a sample may be)."""
    layer, _, name = key.rpartition(".")
    entry = file.entries.get(key)
    if entry is None:
        raise _DamageError(f"layer {layer}: {name} is missing")
    empty = 0 in entry.shape[-1:] and name not in ("row_keys", "row_runs")
    if entry.dtype != dtype or len(entry.shape) != rank or empty:
        raise _DamageError(f"layer {layer}: {name} is {entry.dtype} {list(entry.shape)}")
    tensor = file.read(key)
    if not tensor.isfinite().all():
        raise _DamageError(f"layer {layer}: {name} has NaN or Inf values")
    return tensor


def _load_sensitivities(file: Checkpoint, layers: Mapping[str, LayerStats]) -> dict[str, LayerSensitivity]:
    """Those of layers that have one; layers with the same inputs share one tensor."""
    found, inputs = {}, {}
    for name, stats in layers.items():
        by_gradient = f"{name}.sens_gradients" in file.entries
        if not by_gradient and f"{name}.sens_gain" not in file.entries:
            continue
        holder = name if f"{name}.sens_inputs" in file.entries else stats.group
        if holder not in inputs:
            inputs[holder] = _read(file, f"{holder}.sens_inputs", "BF16", 2)
        rows, width, out = inputs[holder], len(stats.input_amax), len(stats.output_channel_mean)
        if by_gradient:
            gradients, sums = (_read(file, f"{name}.sens_{key}", "BF16", 2) for key in ("gradients", "sums"))
            fits = gradients.shape == (len(rows), out) and len(sums) and sums.shape[1] == out
            found[name] = LayerSensitivity(rows, gradients, sums)
        else:
            found[name] = LayerSensitivity(rows, gain=float(_read(file, f"{name}.sens_gain", "F64", 0)))
            fits = found[name].gain >= 0
        if not fits or not len(rows) or rows.shape[1] != width:
            raise _DamageError(f"layer {name}: its sensitivity does not fit a layer of {width} inputs, {out} outputs")
    return found


def describe(calibration: Calibration) -> str:
    """Layers, rows, amax and outlier ratio (worst / median channel, of E[x^2] ** .5) per layer type, as a table."""
    info = calibration.info
    groups: dict[str, list[LayerStats]] = {}
    for name, stats in calibration.layers.items():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(stats)
    head = f"{'layers':<44}{'n':>4}{'rows seen':>12}{'amax':>11}{'worst/median':>14}{'output var.':>13}"
    lines = [
        printable(f"{info.get('source_file', 'unknown source')}: {info.get('architecture', 'unknown family')}, ")
        + f"{len(calibration.layers)} layers, {len(info.get('runs', []))} runs",
        f"sigmas {len(info.get('sigmas', {}))}, cond rows {info.get('cond_rows', 0)}, uncond rows "
        f"{info.get('uncond_rows', 0)}, sampled rows {sum(len(r.keys) for r in calibration.rows.values())}",
        *_describe_sensitivities(calibration),
        head,
        "-" * len(head),
    ]
    for kind, members in groups.items():
        ratio = max(outlier_ratio(stats) for stats in members)
        amax = max(float(stats.input_amax.max()) for stats in members)
        variance = sum(stats.output_variance for stats in members) / len(members)
        rows = sum(stats.count for stats in members)
        lines.append(f"{kind:<44}{len(members):>4}{rows:>12}{amax:>11.3g}{ratio:>14.1f}{variance:>13.3g}")
    return "\n".join(lines)


def _describe_sensitivities(calibration: Calibration) -> list[str]:
    known = calibration.sensitivities
    if not known:
        return []
    by_gradient = sum(stored.gradients is not None for stored in known.values())
    points = counted(len(calibration.info.get(POINTS, [])), "point")
    return [f"sensitivities of {len(known)} layers from {points} ({by_gradient} of them by gradients)"]


def outlier_ratio(stats: LayerStats) -> float:
    """RMS of the loudest input channel over the median channel's."""
    rms = stats.input_sqmean.sqrt()
    return float(rms.max() / rms.median().clamp(min=1e-30))
