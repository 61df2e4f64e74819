"""Data-free statistics of every layer, and what each format would cost it. NumPy only.

Each weight is read once, kept as stored, and gone through in chunks; threads (NumPy frees the GIL) take a weight
each, and a 1 GB file takes under a second. What statistics can and cannot tell: see :func:`correlations`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibQuantError
from ..models.architectures import LayerInfo, layer_type
from ..models.modelfile import SCALE_BLOCK, ModelFile, scale_step
from ..progress import Progress
from .measure import E4M3_GRID, Rows, errors

CHUNK = 1 << 19  # elements; smaller chunks fit the cache better but fight for the GIL (measured: 2x slower)
SAMPLE = 1 << 15  # weights per layer on which errors and block spreads are measured (about 1 % standard error)
STATISTICS = ("kurtosis", "dynamic_range", "std", "outlier_share", "row_spread", "block16_spread", "block32_spread")


@dataclass(frozen=True)
class LayerProbe:
    """One layer. Spreads are the standard deviation of log2(amax) over rows or blocks, in bits.

    errors: format -> (nearest, searched scale), ||W - Q||^2 / ||W||^2 on sampled rows.
    """

    name: str
    kind: str
    subgraph: str
    block: int | None
    shape: tuple[int, int]
    protected: str
    mean: float
    std: float  # unbiased
    kurtosis: float  # excess: fourth central moment / std**4 - 3, 0 when std is 0
    amax: float
    amin: float  # smallest |w|
    outlier_share: float  # of |w - mean| > outlier_sigma * std
    zeros: int
    row_spread: float
    block16_spread: float
    block32_spread: float
    errors: dict[str, tuple[float, float]]

    @property
    def type(self) -> str:
        return layer_type(self.subgraph, self.kind)

    @property
    def dynamic_range(self) -> float:
        """max|w| - min|w| (quant_probe's definition)."""
        return self.amax - self.amin

    @property
    def aspect_ratio(self) -> float:
        return max(self.shape) / min(self.shape)

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Probe:
    """The probe of one file; ``layers`` in file order, protected ones included."""

    source: str
    architecture: str
    bytes: int  # of the file
    outlier_sigma: float
    sample: int
    layers: list[LayerProbe] = field(default_factory=list)


def probe(
    path: str | os.PathLike[str],
    architecture: str | None = None,
    outlier_sigma: float = 3.0,
    sample: int = SAMPLE,
    progress: Progress | None = None,
    kinds: Collection[str] = (),
) -> Probe:
    """Statistics and format errors of every 2-D weight of the diffusion model (or other parts) in ``path``.

    Scaled FP8 sources are dequantized first. Memory: the largest weight as stored, once per thread.
    Raises CalibQuantError for a quantized source and for NaN/Inf weights, naming the tensor.
    """
    with ModelFile(path, architecture, kinds, lossy=True) as model:
        layers: dict[str, LayerProbe] = {}
        order = sorted(model.layers, key=lambda n: -model.checkpoint.entries[n + ".weight"].nbytes)
        with ThreadPoolExecutor(os.cpu_count() and min(os.cpu_count() or 1, 4)) as pool:
            jobs = {pool.submit(_probe_layer, model, name, outlier_sigma, sample): name for name in order}
            try:
                for done, job in enumerate(as_completed(jobs)):
                    layers[jobs[job]] = job.result()
                    if progress:
                        progress(done + 1, len(jobs), jobs[job])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        nbytes = model.checkpoint.nbytes()
    return Probe(
        model.name, model.architecture.name, nbytes, outlier_sigma, sample, [layers[name] for name in model.layers]
    )


def _probe_layer(model: ModelFile, name: str, outlier_sigma: float, sample: int) -> LayerProbe:
    weight = StoredWeight(model, name)
    info: LayerInfo = model.layers[name]
    sums, row_amax, amin, zeros = np.zeros(4), [], np.inf, 0
    ones = np.ones(weight.chunk, np.float32)
    for rows in weight.chunks():
        x = rows.reshape(-1)
        xx = np.multiply(x, x, out=scratch("square", x.shape, np.float32))
        sums += (x.dot(ones[: x.size]), x.dot(x), xx.dot(x), xx.dot(xx))  # BLAS: a third of the time of sum()
        magnitude = np.abs(rows, out=scratch("square", rows.shape, np.float32))
        row_amax.append(magnitude.max(1))
        amin = min(amin, magnitude.min())
        zeros += np.count_nonzero(np.equal(x, 0, out=scratch("mask", x.shape, np.bool_)))
    tops = np.concatenate(row_amax)
    amax = float(tops.max())
    if not np.isfinite(amax):
        raise CalibQuantError(f"{model.path}: tensor {name}.weight has NaN or Inf values: the source file is damaged")
    mean, std, kurtosis = moments(sums, weight.count)
    rows = weight.sampled(sample)
    return LayerProbe(
        name=name,
        kind=info.kind,
        subgraph=info.subgraph,
        block=info.block,
        shape=weight.shape,
        protected=info.protected,
        mean=mean,
        std=std,
        kurtosis=kurtosis,
        amax=amax,
        amin=float(amin),
        outlier_share=weight.outliers(mean, outlier_sigma * std) / weight.count,
        zeros=int(zeros),
        row_spread=spread(tops),
        block16_spread=_block_spread(rows, 16),
        block32_spread=_block_spread(rows, 32),
        errors=errors(rows, amax),
    )


def moments(sums: NDArray[np.float64], n: int) -> tuple[float, float, float]:
    """(mean, unbiased std, excess kurtosis) from the sums of x, x^2, x^3, x^4 over n elements."""
    m1, m2, m3, m4 = sums / n
    variance = max(m2 - m1 * m1, 0.0) * n / max(n - 1, 1)
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return float(m1), float(variance**0.5), float(fourth / variance**2 - 3) if variance else 0.0


def spread(amax: NDArray[np.float32]) -> float:
    """Standard deviation of log2(amax) over the non-zero entries, in bits."""
    positive = amax[amax > 0]
    return float(np.log2(positive).std()) if positive.size else 0.0


def _block_spread(rows: Rows, size: int) -> float:
    whole = rows[:, : rows.shape[1] // size * size]
    return spread(np.abs(whole).reshape(-1, size).max(1)) if whole.size else 0.0


_scratch = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """An array whose memory this thread uses again under the same name: fresh pages cost more than the arithmetic."""
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    memory = getattr(_scratch, name, None)
    if memory is None or memory.size < wanted:
        memory = np.empty(wanted, np.uint8)
        setattr(_scratch, name, memory)
    return memory[:wanted].view(dtype).reshape(shape)


class StoredWeight:
    """One weight in the bytes of the file, handed out as float32 rows. A thread has one at a time (scratch memory)."""

    def __init__(self, model: ModelFile, name: str) -> None:
        entry = model.checkpoint.entry(f"{name}.weight")
        if 0 in entry.shape:
            raise CalibQuantError(f"{model.path}: tensor {name}.weight is empty: the source file is damaged")
        self.shape: tuple[int, int] = (entry.shape[0], entry.shape[1])
        self.count = entry.shape[0] * entry.shape[1]
        buffer = scratch("stored", (entry.nbytes,), np.uint8)
        model.checkpoint.read_into(entry, 0, memoryview(buffer))
        self._stored = buffer.view(STORED[entry.dtype]).reshape(self.shape)
        self._decode = DECODE[entry.dtype]
        self._scale = _scale(model, name)
        self._rows = max(1, CHUNK // self.shape[1])
        self.chunk = self._rows * self.shape[1]  # weights per chunk

    def rows(self, which: slice | NDArray[np.int64]) -> Rows:
        rows = self._decode(self._stored[which])
        if self._scale is not None:
            scale = self._scale[which]
            wide = scale if scale.shape[1] == 1 else scale.repeat(SCALE_BLOCK, axis=1)[:, : self.shape[1]]
            rows = rows * wide
        return rows

    def chunks(self) -> Iterator[Rows]:
        """All rows, a cache's worth at a time; a chunk's memory is used again for the next."""
        for start in range(0, self.shape[0], self._rows):
            which = slice(start, start + self._rows)
            if self._stored.dtype == np.uint16:  # bfloat16, the common case, without a fresh array
                wide = scratch("chunk", self._stored[which].shape, np.uint32)
                wide[...] = self._stored[which]
                yield np.left_shift(wide, 16, out=wide).view(np.float32)
            else:
                yield self.rows(which)

    def sampled(self, weights: int) -> Rows:
        """About that many weights: whole rows, evenly spaced, at least 16."""
        wanted = min(self.shape[0], max(16, -(-weights // self.shape[1])))
        return self.rows(np.linspace(0, self.shape[0] - 1, wanted).round().astype(np.int64))

    def outliers(self, mean: float, distance: float) -> int:
        """How many weights lie further than ``distance`` from the mean."""
        low, high = np.float32(mean - distance), np.float32(mean + distance)
        if self._stored.dtype != np.uint16 or not low < 0 < high:
            return sum(int(np.count_nonzero(x < low) + np.count_nonzero(x > high)) for x in self.chunks())
        # bfloat16 as integers: codes of one sign are in the order of their magnitudes, so no decoding is needed
        above, below = (np.abs(limit).view(np.uint32) >> 16 for limit in (high, low))
        count, stored = 0, self._stored.reshape(-1)
        for start in range(0, stored.size, CHUNK):
            codes = stored[start : start + CHUNK]
            mask = scratch("mask", codes.shape, np.bool_)
            count += np.count_nonzero(np.greater(codes.view(np.int16), np.int16(above), out=mask))
            count += np.count_nonzero(np.greater(codes, np.uint16(0x8000 + below), out=mask))
        return int(count)


def _scale(model: ModelFile, name: str) -> Rows | None:
    """The scales of each row: one, or one for each block of columns."""
    key = model.scale_key(name)
    if key is None:
        return None
    entry = model.checkpoint.entry(key)
    raw = np.frombuffer(model.checkpoint.read_bytes(key), STORED[entry.dtype])
    shape = model.shape(name)
    rows, _ = scale_step(model.path, name, shape, entry.shape)
    return DECODE[entry.dtype](raw).reshape(-(-shape[0] // rows), -1).repeat(rows, axis=0)[: shape[0]]


def _table(magnitudes: NDArray[np.float32]) -> Rows:
    """Value of each of the 256 codes; the missing magnitudes are NaN (and Inf, which no weight should have)."""
    half = np.full(128, np.nan, np.float32)
    half[: len(magnitudes)] = magnitudes
    return np.concatenate([half, -half])


_E5M2_GRID = np.array([*np.arange(4) / 2**16, *(2.0 ** (e - 15) * (1 + m / 4) for e in range(1, 31) for m in range(4))])
_E4M3, _E5M2 = _table(E4M3_GRID), _table(_E5M2_GRID.astype(np.float32))
STORED = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
DECODE = {
    "F64": lambda x: x.astype(np.float32),
    "F32": lambda x: x.astype(np.float32),
    "F16": lambda x: x.astype(np.float32),
    "BF16": lambda x: (x.astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda x: _E4M3[x],
    "F8_E5M2": lambda x: _E5M2[x],
}


def correlations(probed: Probe) -> dict[str, dict[str, float | None]]:
    """Spearman rank correlation of each statistic with each format's measured error (nearest) on this model.

    Only layers that may be quantized count. None where a column does not vary. Near 0 (or negative) means that the
    statistic does not say which layers suffer in that format.
    """
    layers = [layer for layer in probed.layers if not layer.protected]
    if len(layers) < 3:
        return {}
    columns = {name: np.array([getattr(layer, name) for layer in layers]) for name in STATISTICS}
    formats = list(layers[0].errors)
    measured = {fmt: np.array([layer.errors[fmt][0] for layer in layers]) for fmt in formats}
    return {name: {fmt: spearman(values, measured[fmt]) for fmt in formats} for name, values in columns.items()}


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Rank correlation with average ranks for ties (scipy.stats.spearmanr's value, without its second of import)."""
    ranks = [_ranks(a), _ranks(b)]
    deviations = [r - r.mean() for r in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / norm if norm else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
