"""Independent decoders of the formats in plain NumPy: tables and bit fields, nothing of the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(byte) for byte in range(256)])


def codes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor of one-byte elements."""
    return tensor.contiguous().view(torch.uint8).numpy()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def unswizzle(scales: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Plain [rows, cols] of scales stored in cuBLAS' tiles of 128 x 4."""
    r, c = np.arange(rows)[:, None], np.arange(cols)[None, :]
    flat = ((r // 128) * -(-cols // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    return scales.reshape(-1)[flat]


ROTATED = ("asym_w4a8_int8", "asym_w6a8_int8", "int8_convrot")


def block_size(columns: int) -> int:
    """Columns that are rotated together, by what the loader's kernels take."""
    return next(size for size in (256, 64, 16) if columns % size == 0)


def hadamard(size: int) -> np.ndarray:
    """Orthogonal, symmetric, rows of one sum: negative where an odd number of base-4 digits of i and j add up to 3."""
    i, j = np.indices((size, size))
    sign = np.ones((size, size))
    while size > 1:
        sign[i % 4 + j % 4 == 3] *= -1
        i, j, size = i // 4, j // 4, size // 4
    return sign / len(sign) ** 0.5


def turn(values: np.ndarray, size: int) -> np.ndarray:
    """Columns rotated in blocks; its own inverse."""
    return (values.reshape(len(values), -1, size) @ hadamard(size)).reshape(values.shape)


def decode(fmt: str, tensors: dict[str, torch.Tensor], shape: tuple[int, ...], size: int = 0) -> np.ndarray:
    """float64 weights of the file tensors of one layer (by suffix); size: of the rotated blocks, 0: by the width."""
    values = decode_rotated(fmt, tensors, shape)
    return turn(values, size or block_size(shape[1])) if fmt in ROTATED else values


def decode_rotated(fmt: str, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """float64 weights in the format's own basis."""
    data = codes(tensors["weight"])
    if fmt == "nvfp4":
        nibbles = np.stack([data >> 4, data & 15], -1).reshape(len(data), -1)  # the even weight is in the high half
        scales = E4M3[unswizzle(codes(tensors["weight_scale"]), len(data), nibbles.shape[1] // 16)]
        values = E2M1[nibbles] * scales.repeat(16, axis=1) * tensors["weight_scale_2"].double().item()
    elif fmt == "mxfp8":
        exponents = unswizzle(codes(tensors["weight_scale"]), len(data), data.shape[1] // 32).astype(int)
        scales = np.where(exponents == 0, 0.0, 2.0 ** (exponents - 127))  # comfy-kitchen reads exponent 0 as zero
        values = E4M3[data] * scales.repeat(32, axis=1)
    elif fmt.startswith("asym_"):
        values = _levels(data, tensors, shape[1]) * tensors["weight_s_channel"].double().numpy().reshape(-1, 1)
    elif fmt.startswith("int8_"):
        values = data.view(np.int8) * tensors["weight_scale"].double().numpy()
    else:
        values = E4M3[data] * (tensors["weight_scale"].double().item() if "weight_scale" in tensors else 1.0)
    return values[tuple(slice(n) for n in shape)]


def _levels(data: np.ndarray, tensors: dict[str, torch.Tensor], columns: int) -> np.ndarray:
    """The INT8 levels [rows, columns] of 4- or 6-bit codes: two to a byte, then two more bits, four to a byte."""
    half, column = columns // 2, np.arange(columns)
    code = data[:, column // 2] >> 4 * (column % 2) & 15
    if data.shape[1] > half:
        code = code | (data[:, half + column // 4] >> 2 * (column % 4) & 3) << 4
    table, scales = tensors.get("weight_codebook"), tensors["weight_s_rel"]
    values = code - (32.0 if data.shape[1] > half else 8.0) if table is None else table.double().numpy()[code]
    scales = E4M3[codes(scales)] if scales.element_size() == 1 else scales.double().numpy()
    product = values.astype(np.float32) * scales.repeat(columns // scales.shape[1], axis=1).astype(np.float32)
    return np.rint(product).clip(-127, 127).astype(float)  # of the float32 product: the kernel's own arithmetic


def fed_int8(x: np.ndarray, size: int) -> np.ndarray:
    """Inputs as an INT8 kernel with rotated weights sees them: every row on 255 steps of its largest rotated value."""
    turned = turn(x.astype(float), size)
    step = np.abs(turned).max(1, keepdims=True) / 127
    return turn(np.rint(turned / step) * step, size)


def relative_error(weight: torch.Tensor, decoded: np.ndarray) -> float:
    """||W - Q||^2 / ||W||^2 in float64."""
    exact = weight.double().numpy()
    return float(((exact - decoded) ** 2).sum() / (exact**2).sum())


class File:
    """A finished file as safetensors' own reader sees it."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}

    def configs(self) -> dict[str, dict[str, object]]:
        """Layer -> JSON of its inline ``comfy_quant`` tensor."""
        found = {k.removesuffix(".comfy_quant"): t for k, t in self.tensors.items() if k.endswith(".comfy_quant")}
        return {layer: json.loads(bytes(tensor.tolist())) for layer, tensor in found.items()}

    def layer(self, name: str) -> dict[str, torch.Tensor]:
        return {k[len(name) + 1 :]: t for k, t in self.tensors.items() if k.rpartition(".")[0] == name}

    def decode(self, layer: str, fmt: str, shape: tuple[int, ...]) -> np.ndarray:
        return decode(fmt, self.layer(layer), shape)
