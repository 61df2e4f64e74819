"""What each layer sees and does while a model really samples: collected, stored, merged.

One safetensors file holds it. Per layer ``L`` (named without the checkpoint's prefix): ``L.input_mean``,
``L.input_absmean``, ``L.input_sqmean``, ``L.input_amax`` (float32 [in]), ``L.output_mean``, ``L.output_sqmean``
(float64 scalars; HSWQ's output variance is sqmean - mean**2), ``L.output_channel_mean``,
``L.output_channel_sqmean`` (float32 [out]), ``L.count`` (rows seen) and ``L.calls`` (int64). Layers that see one
tensor share a uniform sample of its rows: ``G.rows`` (bfloat16 [<= N, in]) and ``G.row_keys`` (float64), where G is
the group's first layer; the header says which layer belongs to which G.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import __version__
from .checkpoint import Checkpoint, TensorSpec, Writer
from .errors import CalibQuantError

FORMAT_VERSION = 2  # 1 had no input_mean
METADATA_KEY = "calibquant_calibration"
ROWS = 2048  # of input per group
CACHED = 1 << 16  # elements that a CPU sums at once: they stay in its cache (norms take 3 to 10 times as long there)
PENDING = 256 << 20  # bytes of sampled rows, of all groups together, that may wait on the device to be moved


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


_VECTORS = tuple(f.name for f in fields(LayerStats) if f.type == "torch.Tensor")


@dataclass(frozen=True)
class Rows:
    """A uniform sample without replacement: the rows whose random keys are the largest of all rows seen."""

    rows: torch.Tensor  # bfloat16 [n, in]
    keys: NDArray[np.float64]  # [n], in the order of rows


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers with their provenance (``info``: architecture, source, prompts, seeds, sigmas …)."""

    layers: dict[str, LayerStats] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def rows_of(self, layer: str) -> torch.Tensor:
        """Sampled input rows of a layer, bfloat16 [n, in]."""
        return self.rows[self.layers[layer].group].rows


class Collector:
    """Takes (layer, input, output) of every Linear call and keeps sums on the tensors' own device.

    Nothing waits for the device until :meth:`finish_run`: which rows enter the sample is decided on the host from
    random numbers alone. One instance adds up any number of runs; the same seed, run names and order of calls give
    the same result on any device.

    group_of: layer -> id of the group of layers that see the same tensor ("" or the layer itself: alone).
    """

    def __init__(self, group_of: Callable[[str], str], rows: int = ROWS, seed: int = 0) -> None:
        self._group_of, self._capacity, self._seed = group_of, rows, seed
        self._leaders: dict[str, str] = {}
        self._running: dict[tuple[str, torch.device], _Sums] = {}  # several GPUs may share a run
        self._total: dict[str, _Sums] = {}
        self._reservoirs: dict[str, _Reservoir] = {}
        self._sigmas: list[torch.Tensor] = []
        self._kinds: list[int] = []
        self._run, self._name = "", ""
        self._step = 0
        self._pending = 0  # bytes
        self.info: dict[str, Any] = {"rows": rows, "runs": [], "sigmas": {}, "cond_rows": 0, "uncond_rows": 0}

    def start_run(self, name: str) -> None:
        """Begin one sampling run. Equal names give equal random rows, so name seed and prompt."""
        self.drop_run()
        self._step, self._name = 0, name
        self._run = f"{name}#{self.info['runs'].count(name)}"

    def model_call(self, sigma: torch.Tensor | None, cond_or_uncond: list[int] | None) -> None:
        """One evaluation of the model: its sigma (any shape, kept on its device) and the kinds of its batch rows."""
        self._step += 1
        if sigma is not None:
            self._sigmas.append(sigma.detach().reshape(-1)[:1])
        self._kinds += cond_or_uncond or []

    def add(self, layer: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """One call of a Linear: input [..., in], output [..., out]."""
        x, y = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        if not len(x):
            return
        if (layer, x.device) not in self._running:
            self._running[layer, x.device] = _Sums.zeros(x.shape[1], y.shape[1], x.device)
        self._running[layer, x.device].add(x, y, self._step)
        leader = self._leaders.setdefault(self._group_of(layer) or layer, layer)
        if leader == layer and self._capacity:
            self._pending += self._reservoir(layer, x).offer(x)
            if self._pending > PENDING:
                self._flush()

    def finish_run(self) -> None:
        """Move the run's sums to the host. CalibQuantError names layer and step of the first NaN or Inf."""
        moved = [(name, sums.cpu()) for (name, _), sums in self._running.items()]
        for name, sums in moved:
            step = int(sums.first_bad)
            if step:
                self.drop_run()
                raise CalibQuantError(f"layer {name}: NaN or Inf in its input or output at step {step} of this run")
        for name, sums in moved:
            self._total[name] = self._total[name].plus(sums) if name in self._total else sums
        self._flush()
        for sigma in self._sigmas:
            key = f"{float(sigma):.4g}"
            self.info["sigmas"][key] = self.info["sigmas"].get(key, 0) + 1
        self.info["uncond_rows"] += sum(kind != 0 for kind in self._kinds)
        self.info["cond_rows"] += sum(kind == 0 for kind in self._kinds)
        self.info["runs"].append(self._name)
        self.drop_run()

    def drop_run(self) -> None:
        """Forget an unfinished run's sums (a cancel); rows it sampled stay, they are real inputs."""
        self._running, self._sigmas, self._kinds = {}, [], []

    def result(self, info: Mapping[str, Any] | None = None) -> Calibration:
        """What finished runs gave so far."""
        groups = {name: self._leaders[self._group_of(name) or name] for name in self._total}
        rows = {name: r.result() for name, r in self._reservoirs.items() if name in self._total}
        stats = {name: sums.stats(groups[name]) for name, sums in self._total.items()}
        tool = {"format_version": FORMAT_VERSION, "tool": f"ComfyUI-CalibQuant {__version__}"}
        return Calibration(stats, rows, {**tool, **self.info, **(info or {})})

    def nbytes(self) -> int:
        """Memory held on the host by sampled rows."""
        return sum(r.nbytes() for r in self._reservoirs.values())

    def _flush(self) -> None:
        for reservoir in self._reservoirs.values():
            reservoir.flush()
        self._pending = 0

    def _reservoir(self, layer: str, x: torch.Tensor) -> _Reservoir:
        if layer not in self._reservoirs:
            self._reservoirs[layer] = _Reservoir(self._capacity, x.shape[1])
        reservoir = self._reservoirs[layer]
        reservoir.start(self._run, (self._seed, zlib.crc32(layer.encode()), zlib.crc32(self._run.encode())))
        return reservoir


@dataclass
class _Sums:
    """Sums over rows (vectors, float64 where the device has it) and over calls (the two output scalars)."""

    count: int
    calls: int
    total: torch.Tensor
    absolute: torch.Tensor
    square: torch.Tensor
    amax: torch.Tensor
    output: torch.Tensor
    output_square: torch.Tensor
    call_mean: torch.Tensor
    call_square: torch.Tensor
    first_bad: torch.Tensor

    @classmethod
    def zeros(cls, width: int, out: int, device: torch.device) -> _Sums:
        wide = torch.float32 if device.type == "mps" else torch.float64

        def zero(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        amax = zero(width, dtype=torch.float32)
        inputs, outputs = (zero(width) for _ in range(3)), (zero(out) for _ in range(2))
        return cls(0, 0, *inputs, amax, *outputs, zero(), zero(), zero(dtype=torch.int64))

    def add(self, x: torch.Tensor, y: torch.Tensor, step: int) -> None:
        total, absolute, square, amax = _input_sums(x)
        output, output_square = _output_sums(y)
        self.count += x.shape[0]
        self.calls += 1
        self.total += total
        self.absolute += absolute
        self.square += square
        self.amax = torch.maximum(self.amax, amax)
        self.output += output
        self.output_square += output_square
        self.call_mean += output.to(self.output.dtype).mean() / y.shape[0]
        self.call_square += output_square.to(self.output.dtype).mean() / y.shape[0]
        finite = torch.isfinite(amax.max() + output_square.max())
        self.first_bad = torch.where((self.first_bad == 0) & ~finite, step, self.first_bad)

    def cpu(self) -> _Sums:
        moved = {name: t.cpu() for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved)

    def plus(self, other: _Sums) -> _Sums:
        summed = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "amax"}
        return _Sums(amax=torch.maximum(self.amax, other.amax), **summed)

    def stats(self, group: str) -> LayerStats:
        return LayerStats(
            group,
            self.count,
            self.calls,
            (self.total / self.count).float(),
            (self.absolute / self.count).float(),
            (self.square / self.count).float(),
            self.amax.float(),
            float(self.call_mean / self.calls),
            float(self.call_square / self.calls),
            (self.output / self.count).float(),
            (self.output_square / self.count).float(),
        )


def _input_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum x, sum |x|, sum x^2 and max |x| over the rows of x [n, width]: float32 [width] each."""
    if x.device.type != "cpu":  # these reduce in float32 without a float32 copy of the activation
        return x.sum(0, dtype=torch.float32), _norm(x, 1), _norm(x, 2).square_(), _norm(x, float("inf"))
    total, one, two, most = torch.zeros(4, x.shape[1]).unbind()
    for piece in x.split(max(1, CACHED // x.shape[1])):
        wide = piece.float()
        total += wide.sum(0)
        absolute = wide.abs()
        one += absolute.sum(0)
        most = torch.maximum(most, absolute.amax(0))
        two += absolute.square_().sum(0)
    return total, one, two, most


def _output_sums(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum y and sum y^2 over the rows of y [n, width]: float32 [width] each."""
    if y.device.type != "cpu":
        return y.sum(0, dtype=torch.float32), _norm(y, 2).square_()
    one, two = torch.zeros(2, y.shape[1]).unbind()
    for piece in y.split(max(1, CACHED // y.shape[1])):
        one += piece.sum(0, dtype=torch.float32)
        two += piece.float().square().sum(0)
    return one, two


def _norm(x: torch.Tensor, order: float) -> torch.Tensor:
    return torch.linalg.vector_norm(x, order, 0, dtype=torch.float32)


class _Reservoir:
    """The rows with the largest random keys of all rows offered; keys come from the host, rows follow later."""

    def __init__(self, capacity: int, width: int) -> None:
        self._keys = np.empty(0)
        with torch.inference_mode(False):  # else what one inference block makes cannot be filled outside of it
            self._rows = torch.empty((capacity, width), dtype=torch.bfloat16)
        self._pending: list[tuple[NDArray[np.int64], torch.Tensor]] = []
        self._run = ""

    def start(self, run: str, entropy: tuple[int, ...]) -> None:
        if run != self._run:
            self._run, self._random = run, np.random.default_rng(entropy)

    def offer(self, x: torch.Tensor) -> int:
        """Take some rows of x, or none; the bytes that now wait on x's device."""
        keys = self._random.random(len(x))
        old, capacity = len(self._keys), len(self._rows)
        rows = np.flatnonzero(keys > self._keys.min()) if old == capacity else np.arange(len(keys))
        every = np.concatenate([self._keys, keys[rows]])
        kept = np.ones(len(every), bool)
        if len(every) > capacity:
            kept[np.argpartition(-every, capacity)[capacity:]] = False
        rows = rows[kept[old:]]
        if not len(rows):
            return 0
        free = np.concatenate([np.flatnonzero(~kept[:old]), np.arange(old, capacity)])[: len(rows)]
        self._keys = np.concatenate([self._keys, np.zeros(max(0, free.max() + 1 - old))])
        self._keys[free] = keys[rows]
        taken = x.index_select(0, _index(rows, x.device)).to(torch.bfloat16)
        self._pending.append((free, taken))
        return taken.nbytes

    def flush(self) -> None:
        for slots, rows in self._pending:
            self._rows[torch.from_numpy(slots)] = rows.cpu()
        self._pending = []

    def result(self) -> Rows:
        self.flush()
        rows = self._rows[: len(self._keys)]
        finite = rows.isfinite().all(1)  # a run that was dropped for its NaN leaves rows behind
        return Rows(rows[finite], self._keys[finite.numpy()])

    def nbytes(self) -> int:
        return self._rows.nbytes


def _index(rows: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Row numbers on the device; from pinned memory, because any other copy waits until the GPU is idle."""
    index = torch.from_numpy(rows)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


# --- merging, files ----------------------------------------------------------------------------------------------


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
    merged = {name: _merge_rows(a, b, name, rows) for name in {**a.rows, **b.rows}}
    info = {**b.info, **a.info}
    lists = {name for name, value in a.info.items() if isinstance(value, list) and name in b.info}
    info |= {name: a.info[name] + [v for v in b.info[name] if v not in a.info[name]] for name in lists}
    info["rows"] = rows
    info["runs"] = a.info.get("runs", []) + b.info.get("runs", [])
    info["sigmas"] = dict(Counter(a.info.get("sigmas", {})) + Counter(b.info.get("sigmas", {})))
    for name in ("cond_rows", "uncond_rows"):
        info[name] = a.info.get(name, 0) + b.info.get(name, 0)
    return Calibration(layers, merged, info)


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
    keys = np.concatenate([sample.keys for sample, _ in samples])
    floor = max((sample.keys.min() for sample, seen in samples if 0 < len(sample.keys) != seen), default=0.0)
    order = np.argsort(-keys, kind="stable")[: min(capacity, int((keys >= floor).sum()))]
    return Rows(torch.cat([sample.rows for sample, _ in samples])[torch.from_numpy(order)], keys[order])




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
    groups = {name: stats.group for name, stats in calibration.layers.items()}
    metadata = {METADATA_KEY: json.dumps({**calibration.info, "groups": groups}, ensure_ascii=False)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Writer(path, specs, metadata, overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration file; CalibQuantError when it is none."""
    with Checkpoint(path) as file:
        try:
            info = json.loads(file.metadata[METADATA_KEY])
            groups = info.pop("groups")
            version = info["format_version"]
            if version != FORMAT_VERSION:
                raise CalibQuantError(
                    f"{file.path}: is a calibration of format version {version}, not {FORMAT_VERSION}: calibrate again"
                )
            layers = {name: _load_stats(file, name, group) for name, group in groups.items()}
            names = {stats.group for stats in layers.values() if f"{stats.group}.rows" in file.entries}
            rows = {n: Rows(file.read(f"{n}.rows"), file.read(f"{n}.row_keys").numpy()) for n in sorted(names)}
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise CalibQuantError(f"{file.path}: is no calibration of this tool ({e!r}): calibrate again") from e
    return Calibration(layers, rows, info)


def _load_stats(file: Checkpoint, name: str, group: str) -> LayerStats:
    vectors = {key: file.read(f"{name}.{key}") for key in _VECTORS}
    count, calls = (int(file.read(f"{name}.{key}")) for key in ("count", "calls"))
    mean, sqmean = (float(file.read(f"{name}.{key}")) for key in ("output_mean", "output_sqmean"))
    return LayerStats(group, count, calls, output_mean=mean, output_sqmean=sqmean, **vectors)


def describe(calibration: Calibration) -> str:
    """Layers, rows, amax and outlier ratio (worst / median channel, of E[x^2] ** .5) per layer type, as a table."""
    info = calibration.info
    groups: dict[str, list[LayerStats]] = {}
    for name, stats in calibration.layers.items():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(stats)
    head = f"{'layers':<44}{'n':>4}{'rows seen':>12}{'amax':>11}{'worst/median':>14}{'output var.':>13}"
    lines = [
        f"{info.get('source_file', 'unknown source')}: {info.get('architecture', 'unknown family')}, "
        f"{len(calibration.layers)} layers, {len(info.get('runs', []))} runs",
        f"sigmas {len(info.get('sigmas', {}))}, cond rows {info.get('cond_rows', 0)}, uncond rows "
        f"{info.get('uncond_rows', 0)}, sampled rows {sum(len(r.keys) for r in calibration.rows.values())}",
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


def outlier_ratio(stats: LayerStats) -> float:
    """RMS of the loudest input channel over the median channel's."""
    rms = stats.input_sqmean.sqrt()
    return float(rms.max() / rms.median().clamp(min=1e-30))
