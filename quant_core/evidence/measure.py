"""What each format would cost, measured on sampled rows. NumPy only, so that a probe need not wait for torch.

The scale rules are those of ``formats``; tests hold the two to the same errors. Every function takes float32
``rows`` [n, in] of a weight and its amax and returns (error by the nearest rule, error with searched scales), both
||W - Q||^2 / ||W||^2 over the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
E4M3_MAX, E2M1_MAX, INT8_MAX = np.float32(448), np.float32(6), np.float32(127)
# E4M3's 127 finite magnitudes in code order: subnormals in steps of 2**-9, then eight values an octave.
E4M3_GRID = np.array([*np.arange(8) / 512, *(2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8))])
E4M3_GRID = E4M3_GRID[:127].astype(np.float32)
BLOCK_CODES = range(-4, 9)  # E4M3 codes around the nearest rule's: as good as trying all 126 (peers' measurements)
# Relative standard deviation of the measured error between samples of 2**15 weights of one Gaussian (60 samples).
NOISE = {
    "nvfp4": 0.010,
    "mxfp8": 0.010,
    "float8_e4m3fn": 0.011,
    "int8_tensorwise": 0.038,
    "float8_e4m3fn_unscaled": 0.010,
}
FACTORS = np.float32(2.0) ** (np.arange(-8, 9, dtype=np.float32) / 16)  # of a tensor or row scale


def round_e4m3(y: Rows) -> Rows:
    """Nearest E4M3 magnitude of y >= 0, saturating."""
    y = np.minimum(y, E4M3_MAX)
    exponent = np.maximum(np.frexp(y)[1] - 1, -6)
    step = np.ldexp(np.float32(1), exponent - 3)
    return np.rint(y / step) * step


def round_e2m1(y: Rows) -> Rows:
    """Nearest E2M1 magnitude of y >= 0, saturating (the three counts of ``formats.nvfp4.round_e2m1``)."""
    y = np.minimum(y, E2M1_MAX)
    count = np.minimum(np.minimum(np.rint(y * 2), np.rint(y) + 2), np.rint(y * np.float32(0.5)) + 4)
    return np.maximum(np.maximum(count * np.float32(0.5), count - 2), count * 2 - 8)


def _blocks(rows: Rows, size: int) -> Rows:
    """|w| as [blocks, size], the last block of a row padded with zeros."""
    padding = -rows.shape[1] % size
    return np.abs(np.pad(rows, ((0, 0), (0, padding))) if padding else rows).reshape(-1, size)


def _scaled(y: Rows, step: Rows) -> Rows:
    return np.divide(y, step, out=np.zeros_like(y), where=step != 0)


def _block_errors(y: Rows, step: Rows, rounded: Callable[[Rows], Rows]) -> NDArray[np.float64]:
    """Squared error per block of |w| [blocks, size] for steps [blocks]."""
    step = step[:, None]
    difference = rounded(_scaled(y, step)) * step - y
    return np.einsum("ij,ij->i", difference, difference).astype(np.float64)


def _share(errors: NDArray[np.float64], y: Rows) -> float:
    energy = float(np.einsum("ij,ij->", y, y, dtype=np.float64))
    return float(errors.sum()) / energy if energy else float(errors.sum())


def nvfp4(rows: Rows, amax: np.float32) -> tuple[float, float]:
    y = _blocks(rows, 16)
    tensor_scale = _power_of_two_at_least(np.float32(amax / (E2M1_MAX * E4M3_MAX)))
    wanted = np.minimum(_scaled(y.max(1) / E2M1_MAX, np.full(len(y), tensor_scale)), E4M3_MAX)
    codes = np.searchsorted(E4M3_GRID, round_e4m3(wanted))
    errors = {
        d: _block_errors(y, E4M3_GRID[np.clip(codes + d, 0, 126)] * tensor_scale, round_e2m1) for d in BLOCK_CODES
    }
    return _share(errors[0], y), _share(np.min(list(errors.values()), axis=0), y)


def mxfp8(rows: Rows, amax: np.float32) -> tuple[float, float]:
    y = _blocks(rows, 32)
    top = y.max(1)
    exponent = np.ceil(np.log2(np.maximum(top / E4M3_MAX, np.float32(2.0**-127)))).astype(np.int32)
    errors = []
    for shift in (0, -1, 1):
        step = np.where(top == 0, np.float32(0), np.ldexp(np.float32(1), np.clip(exponent + shift, -126, 127)))
        errors.append(_block_errors(y, step.astype(np.float32), round_e4m3))
    return _share(errors[0], y), _share(np.min(errors, axis=0), y)


def float8_e4m3fn(rows: Rows, amax: np.float32) -> tuple[float, float]:
    y = np.abs(rows)
    scale = np.float32((amax or E4M3_MAX) / E4M3_MAX)
    errors = [_share(_block_errors(y, np.full(len(y), scale * f), round_e4m3), y) for f in FACTORS]
    return errors[len(FACTORS) // 2], min(errors)


def int8_tensorwise(rows: Rows, amax: np.float32) -> tuple[float, float]:
    y = np.abs(rows)
    scale = np.maximum(y.max(1) / INT8_MAX, np.float32(1e-30))
    errors = [_block_errors(y, scale * f, lambda q: np.minimum(np.rint(q), INT8_MAX)) for f in FACTORS]
    return _share(errors[len(FACTORS) // 2], y), _share(np.min(errors, axis=0), y)


def float8_e4m3fn_unscaled(rows: Rows, amax: np.float32) -> tuple[float, float]:
    y = np.abs(rows)
    error = _share(_block_errors(y, np.ones(len(y), np.float32), round_e4m3), y)
    return error, error


def _power_of_two_at_least(scale: np.float32) -> np.float32:
    if scale <= 0:
        return np.float32(0)
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.float32(1), max(int(exponent) - (mantissa == 0.5), -126))


Measure = Callable[[Rows, np.float32], tuple[float, float]]
MEASURES: dict[str, Measure] = {
    f.__name__: f for f in (nvfp4, mxfp8, float8_e4m3fn, int8_tensorwise, float8_e4m3fn_unscaled)
}


def errors(rows: Rows, amax: float) -> dict[str, tuple[float, float]]:
    """Format -> (error nearest, error with searched scales) of the sampled rows."""
    return {name: measure(rows, np.float32(amax)) for name, measure in MEASURES.items()}
