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
W4A8_TABLE = np.array(  # for Gaussian groups; a file whose weights are heavy-tailed gets one of its own, and less error
    [
        *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
        *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
    ],
    np.float32,
)
LEAST = np.float32(1e-8)
BLOCK_CODES = range(-4, 9)  # E4M3 codes around the nearest rule's: as good as trying all 126 (peers' measurements)
# Relative standard deviation of the measured error between samples of 2**15 weights of one Gaussian (60 samples).
NOISE = {
    "nvfp4": 0.010,
    "asym_w4a8_int8": 0.006,
    "asym_w6a8_int8": 0.011,
    "mxfp8": 0.010,
    "float8_e4m3fn": 0.011,
    "int8_convrot": 0.042,
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


def rotated(rows: Rows) -> Rows:
    """Rows in the basis that rotated formats round in (``formats.base.turn``)."""
    size = next((n for n in (256, 64, 16) if rows.shape[1] % n == 0), 0)
    if not size:
        return rows
    matrix = four = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return (rows.reshape(len(rows), -1, size) @ (matrix / np.float32(size**0.5))).reshape(rows.shape)


def int8_convrot(rows: Rows, amax: np.float32) -> tuple[float, float]:
    return int8_tensorwise(rotated(rows), amax)


def asym_w4a8_int8(rows: Rows, amax: np.float32) -> tuple[float, float]:
    return _levels_of_int8(rows, W4A8_TABLE, np.float32(1), shifts=(0,))


def asym_w6a8_int8(rows: Rows, amax: np.float32) -> tuple[float, float]:
    return _levels_of_int8(rows, np.arange(-31, 32, dtype=np.float32), np.float32(31), shifts=(0, -1, 1))


def _levels_of_int8(rows: Rows, table: Rows, top: np.float32, shifts: tuple[int, ...]) -> tuple[float, float]:
    """Table values times a group scale, rounded to INT8 and times a row scale (``formats.w4a8``).

    No search: it gains nothing on weights alone. Shapes without a rotation are measured as they are.
    """
    x = rotated(rows)
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / top, LEAST)
    for _ in range(2):
        near = table[_nearest_index(blocks / scale, table)]
        fitted = (blocks * near).sum(-1, keepdims=True) / np.maximum((near * near).sum(-1, keepdims=True), LEAST)
        scale = np.maximum(fitted, LEAST)
    loudest = np.abs(table[_nearest_index(blocks / scale, table)] * scale).max((1, 2), keepdims=True)
    row = np.maximum(loudest / INT8_MAX, LEAST)
    code = np.searchsorted(E4M3_GRID, round_e4m3(scale / row))
    errors = []
    for shift in shifts:
        step = E4M3_GRID[np.clip(code + shift, 0 if shift == 0 else 1, 126)]
        levels = np.clip(np.rint(table * step), -INT8_MAX, INT8_MAX)
        wanted, best = blocks / row, np.full(blocks.shape, np.inf, np.float32)
        for i in range(levels.shape[-1]):
            best = np.minimum(best, np.abs(wanted - levels[..., i : i + 1]))
        errors.append(((best * row) ** 2).sum(-1, dtype=np.float64))
    error = _share(np.min(errors, axis=0), x)
    return error, error


def _nearest_index(scaled: Rows, table: Rows) -> NDArray[np.int64]:
    return np.searchsorted((table[1:] + table[:-1]) / 2, scaled)


def _power_of_two_at_least(scale: np.float32) -> np.float32:
    if scale <= 0:
        return np.float32(0)
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.float32(1), max(int(exponent) - (mantissa == 0.5), -126))


Measure = Callable[[Rows, np.float32], tuple[float, float]]
MEASURES: dict[str, Measure] = {
    f.__name__: f
    for f in (
        *(nvfp4, asym_w4a8_int8, asym_w6a8_int8, mxfp8, float8_e4m3fn),
        *(int8_convrot, int8_tensorwise, float8_e4m3fn_unscaled),
    )
}


def errors(rows: Rows, amax: float) -> dict[str, tuple[float, float]]:
    """Format -> (error nearest, error with searched scales) of the sampled rows."""
    return {name: measure(rows, np.float32(amax)) for name, measure in MEASURES.items()}
