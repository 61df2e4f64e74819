"""Adds up what each layer sees and does while a model runs: sums on the tensors' own device, a sample of input rows.

``watch`` feeds it from a model's modules; ``calibration`` is what it results in, and the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from ..errors import CalibQuantError
from .calibration import FORMAT_VERSION, ROWS, ROWS_MEMORY, UNKNOWN, Calibration, LayerStats, Rows, capacities

CACHED = 1 << 16  # elements that a CPU sums at once: they stay in its cache (norms take 3 to 10 times as long there)
PENDING = 256 << 20  # bytes of sampled rows, of all groups together, that may wait on the device to be moved


class Collector:
    """Takes (layer, input, output) of every Linear call and keeps sums on the tensors' own device.

    Nothing waits for the device until :meth:`finish_run`: which rows enter the sample is decided on the host from
    random numbers alone. One instance adds up any number of runs; the same seed, run names and order of calls give
    the same result on any device.

    group_of: layer -> id of the group of layers that see the same tensor ("" or the layer itself: alone).
    memory: bytes, for more than ``rows`` of wide layers (``capacities``), of those that were told to ``expect``.
    """

    def __init__(self, group_of: Callable[[str], str], rows: int = ROWS, seed: int = 0, memory: int = 0) -> None:
        self._group_of, self._capacity, self._seed, self._memory = group_of, rows, seed, memory
        self._wide: dict[str, int] = {}  # group -> rows
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
        self.info |= {ROWS_MEMORY: memory} if memory else {}

    def expect(self, widths: Mapping[str, int]) -> None:
        """The model's layers with their numbers of inputs, before the first run."""
        if self._memory and not self._wide:
            groups = {self._group_of(layer) or layer: width for layer, width in widths.items()}
            self._wide = capacities(groups, self._capacity, self._memory)

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
        rows = {n: r.result(len(self.info["runs"])) for n, r in self._reservoirs.items() if n in self._total}
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
            capacity = self._wide.get(self._group_of(layer) or layer, self._capacity)
            self._reservoirs[layer] = _Reservoir(capacity, x.shape[1])
        reservoir = self._reservoirs[layer]
        entropy = (self._seed, zlib.crc32(layer.encode()), zlib.crc32(self._run.encode()))
        reservoir.start(self._run, len(self.info["runs"]), entropy)
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
        self._runs = np.empty(0, np.int32)
        with torch.inference_mode(False):  # else what one inference block makes cannot be filled outside of it
            self._rows = torch.empty((capacity, width), dtype=torch.bfloat16)
        self._pending: list[tuple[NDArray[np.int64], torch.Tensor]] = []
        self._run = ""

    def start(self, run: str, place: int, entropy: tuple[int, ...]) -> None:
        """place: where the run will be in the list of runs; a dropped run's rows count as those of its successor."""
        if run != self._run:
            self._run, self._place, self._random = run, place, np.random.default_rng(entropy)

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
        more = max(0, free.max() + 1 - old)
        self._keys = np.concatenate([self._keys, np.zeros(more)])
        self._runs = np.concatenate([self._runs, np.zeros(more, np.int32)])
        self._keys[free], self._runs[free] = keys[rows], self._place
        taken = x.index_select(0, _index(rows, x.device)).to(torch.bfloat16)
        self._pending.append((free, taken))
        return taken.nbytes

    def flush(self) -> None:
        for slots, rows in self._pending:
            self._rows[torch.from_numpy(slots)] = rows.cpu()
        self._pending = []

    def result(self, finished: int) -> Rows:
        """The sample so far; finished: the number of finished runs, of which alone the name is known."""
        self.flush()
        rows = self._rows[: len(self._keys)]
        finite = rows.isfinite().all(1)  # a run that was dropped for its NaN leaves rows behind
        runs = np.where(self._runs < finished, self._runs, UNKNOWN).astype(np.int32)
        return Rows(rows[finite], self._keys[finite.numpy()], runs[finite.numpy()])

    def nbytes(self) -> int:
        return self._rows.nbytes


def _index(rows: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Row numbers on the device; from pinned memory, because any other copy waits until the GPU is idle."""
    index = torch.from_numpy(rows)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
