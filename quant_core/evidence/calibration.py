"""The calibration file: what each layer sees and does while a model really samples (``statistics``).

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

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CalibQuantError, printable
from ..files.checkpoint import Checkpoint, TensorSpec, Writer
from ..files.disk import stat_of
from ..files.text import counted, parse_json
from .sensitivity import LayerSensitivity
from .statistics import (
    ROWS,
    ROWS_MEMORY,
    UNKNOWN,
    VECTORS,
    Calibration,
    LayerStats,
    Rows,
    capacities,
    merge,
    merge_sensitivities,
)

__all__ = [
    "POINTS", "ROWS", "ROWS_MEMORY", "UNKNOWN", "Calibration", "LayerStats", "Rows", "capacities", "describe", "load",
    "merge", "merge_sensitivities", "outlier_ratio", "save",
]  # fmt: skip

FORMAT_VERSION = 4  # 1 had no input_mean, 2 no row_runs, 3 no sensitivities
READABLE = (2, 3, 4)
METADATA_KEY = "calibquant_calibration"
POINTS = "sensitivity_points"  # in info: which runs and sigmas sensitivities were measured at


def save(calibration: Calibration, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write ``*.calibration.safetensors`` (any ``*.safetensors`` name), atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, stats in calibration.layers.items():
        tensors |= {f"{name}.{key}": getattr(stats, key) for key in VECTORS}
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


def load(path: str | os.PathLike[str], leave_rows: bool = False) -> Calibration:
    """Read and check a calibration file; CalibQuantError when it is none, or names the layer that is damaged.

    leave_rows: checked, but read again when they are looked at; the file must stay as it is.
    """
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
            left = RowFile(file) if leave_rows else None
            rows = {name: _load_rows(file, name, layers, runs, left) for name in sorted(set(groups.values()))}
            known = _load_sensitivities(file, layers)
        except _DamageError as e:
            raise CalibQuantError(f"{problem}: {e}: {remedy}") from e
    sampled = {name: sample for name, sample in rows.items() if sample is not None}
    return Calibration(layers, sampled, info, known)


class StoredRows(Rows):
    """Rows that stay in their file until they are looked at: those of a whole Flux are 6 GB."""

    def __init__(self, file: RowFile, name: str, keys: NDArray[np.float64], runs: NDArray[np.int32]) -> None:
        for attribute, value in (("_file", file), ("_name", name), ("keys", keys), ("runs", runs)):
            object.__setattr__(self, attribute, value)

    @property
    def rows(self) -> torch.Tensor:  # type: ignore[override]
        return self._file.read(self._name)


class RowFile:
    """A calibration file that was checked, for the rows in it; those that were read last are kept."""

    def __init__(self, file: Checkpoint) -> None:
        self._file, self._stamp = file, stat_of(file.path)
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        last = self._last
        if last is None or last[0] != name:
            self._check()
            with self._file:
                self._last = last = name, self._file.read(name)
        return last[1]

    def _check(self) -> None:
        now, then = stat_of(self._file.path), self._stamp
        if now is None or then is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise CalibQuantError(f"{self._file.path}: was changed or removed while it was in use: run again")


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
    vectors = {key: _read(file, f"{name}.{key}", "F32", 1) for key in VECTORS}
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


def _load_rows(
    file: Checkpoint, group: str, layers: Mapping[str, LayerStats], runs: int, left: RowFile | None
) -> Rows | None:
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
    of = np.full(len(keys), UNKNOWN, np.int32)
    if f"{group}.row_runs" in file.entries:
        of = _read(file, f"{group}.row_runs", "I32", 1).numpy()
    if len(of) != len(keys) or not ((of >= UNKNOWN) & (of < runs)).all():
        raise _DamageError(f"layer {group}: its rows name runs that are not in the header")
    return StoredRows(left, f"{group}.rows", keys.numpy(), of) if left else Rows(rows, keys.numpy(), of)


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
