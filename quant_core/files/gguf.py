"""GGUF files: their headers, fully checked, and their values. No torch.

Format: github.com/ggml-org/ggml, docs/gguf.md; block types: ggml's ``ggml-common.h``. Own code for the header, because
the package ``gguf`` maps the file and runs without end on a damaged count; it decodes the block types below Q8_0,
which need no more than an optional package. What converters of diffusion models add (city96/ComfyUI-GGUF,
``tools``): ``comfy.gguf.orig_shape.NAME`` is the shape of a tensor that ggml could not have.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CalibQuantError
from .entry import ITEMSIZE, MAX_HEADER, MAX_NAME, Blocks, Header, TensorEntry

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # of one layout; version 1 is older than any diffusion model's file
MAX_DIMENSIONS = 8  # ggml has 4
ALIGNMENT = 32
PIECE = 8 << 20  # bytes of values decoded at once
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

Value = Any  # of a header: number, text, or a short list of numbers
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_SHORT = 64  # elements of a list that is kept; longer ones are a tokenizer's


def _decode_q8_0(stored: bytearray) -> memoryview:
    """Blocks of a float16 scale and 32 int8 codes. A product has up to 18 bits: exact in float32."""
    import numpy as np

    blocks = np.frombuffer(stored, np.dtype([("scale", "<f2"), ("codes", "i1", 32)]))
    return memoryview(blocks["codes"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]).cast("B")


def _decode_with_package(kind: int, stored: bytearray) -> memoryview:
    import numpy as np

    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as e:
        raise CalibQuantError(
            f"GGUF {BLOCKS[kind].name} is decoded by the package gguf, which is missing: pip install gguf"
        ) from e
    blocks = np.frombuffer(stored, np.uint8).reshape(-1, BLOCKS[kind].nbytes)
    values = quants.dequantize(blocks, GGMLQuantizationType(kind))
    return memoryview(np.ascontiguousarray(values, np.float32)).cast("B")


PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
BLOCKS = {8: Blocks("Q8_0", 32, 34, _decode_q8_0, lossy=False)} | {
    kind: Blocks(name, values, nbytes, partial(_decode_with_package, kind))
    for kind, name, values, nbytes in (
        *((2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24)),
        *((10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176)),
        *((14, "Q6_K", 256, 210), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98)),
        *((19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82)),
        *((23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66)),
        (39, "MXFP4", 32, 17),
    )
}


def read_header(file: Path, stream: BinaryIO, size: int) -> Header:
    """Everything but the tensors of a file that begins with MAGIC."""
    damaged, remedy = f"{file}: the GGUF header is damaged", "download the file again"
    try:
        stream.seek(0)
        reader = _Reader(stream, min(size, MAX_HEADER))
        _, version, tensors, pairs = reader.unpack("4sIQQ")
        if version not in VERSIONS:
            raise CalibQuantError(
                f"{file}: is GGUF of version {version}, read are {VERSIONS}: give a .safetensors file"
            )
        values = _pairs(reader, pairs)
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}")
        found = [_info(file, reader, values) for _ in range(reader.counted(tensors, 24))]
        base = _roundup(reader.position, alignment)
        entries = _placed(file, found, base, alignment, size)
    except (ValueError, struct.error) as e:  # UnicodeDecodeError is a ValueError
        raise CalibQuantError(f"{damaged} ({e}): {remedy}") from e
    texts = {key: value for key, value in values.items() if isinstance(value, str) and "." not in key}
    return Header(entries, texts, size, base)


def read_values(entry: TensorEntry, offset: int, target: memoryview, read: Callable[[int, memoryview], None]) -> None:
    """Fill ``target`` with decoded bytes from ``offset`` on; read(offset, target) gets stored ones."""
    blocks, done = entry.blocks, 0
    assert blocks is not None
    wide = blocks.values * ITEMSIZE[entry.dtype]
    while done < len(target):
        first, inside = divmod(offset + done, wide)
        count = -(-(inside + min(len(target) - done, PIECE)) // wide)
        stored = bytearray(count * blocks.nbytes)
        read(first * blocks.nbytes, memoryview(stored))
        values = memoryview(blocks.decode(stored))[inside : inside + len(target) - done]
        target[done : done + len(values)] = values
        done += len(values)


class _Reader:
    """Little-endian values from a stream, none beyond ``end``: a damaged length must not cost memory or time."""

    def __init__(self, stream: BinaryIO, end: int) -> None:
        self._stream, self._end, self.position = stream, end, 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > self._end - self.position:
            raise ValueError("it goes beyond the file's end or is too large")
        self.position += nbytes
        return self._stream.read(nbytes)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self) -> str:
        return self.take(self.unpack("Q")[0]).decode("utf-8")

    def counted(self, count: int, least: int) -> int:
        """A number of things of at least so many bytes, if there can be as many."""
        if count > (self._end - self.position) // least:
            raise ValueError(f"{count} entries do not fit into it")
        return count


def _pairs(reader: _Reader, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for _ in range(reader.counted(count, 13)):
        key = reader.text()
        if key in values:
            raise ValueError("a key occurs twice")
        values[key] = _value(reader, reader.unpack("I")[0])
    return values


def _value(reader: _Reader, kind: int) -> Value:
    if kind in _SCALARS:
        return reader.unpack(_SCALARS[kind])[0]
    if kind == _TEXT:
        return reader.text()
    if kind != _ARRAY:
        raise ValueError(f"a value has type {kind}")
    inner, count = reader.unpack("IQ")
    if inner == _TEXT:
        for _ in range(reader.counted(count, 8)):
            reader.take(reader.unpack("Q")[0])
        return None
    if inner not in _SCALARS:
        raise ValueError(f"a list holds type {inner}")
    width = struct.calcsize("<" + _SCALARS[inner])
    raw = reader.take(reader.counted(count, width) * width)
    return list(struct.unpack(f"<{count}{_SCALARS[inner]}", raw)) if count <= _SHORT else None


def _info(file: Path, reader: _Reader, values: dict[str, Value]) -> TensorEntry:
    """One tensor; its start is as yet counted from the first tensor's."""
    name, (rank,) = reader.text(), reader.unpack("I")
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{name[:40]!r} is no name of a tensor")
    if rank > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {rank} dimensions")
    *sizes, kind, start = reader.unpack(f"{rank}QIQ")
    shape = tuple(reversed(sizes))  # ggml names the innermost dimension first
    if not all(0 < n < 2**48 for n in sizes) or math.prod(shape) >= 2**60:
        raise ValueError(f"tensor {name} has shape {shape}")
    blocks = BLOCKS.get(kind)
    if blocks is None and kind not in PLAIN:
        raise CalibQuantError(
            f"{file}: tensor {name} has the GGUF type {kind}, which is not known here: convert it first"
        )
    if blocks and (not shape or shape[-1] % blocks.values):
        raise ValueError(f"tensor {name} of shape {shape} is no whole number of {blocks.name} blocks")
    dtype = "F32" if blocks else PLAIN[kind]
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    original = values.get(ORIGINAL_SHAPE + name)
    if original is not None:
        if not isinstance(original, list) or not all(type(n) is int and n > 0 for n in original):
            raise ValueError(f"the original shape of tensor {name} is {original}")
        if math.prod(original) != math.prod(shape):
            raise ValueError(f"tensor {name} has shape {shape}, and had {original}")
        shape = tuple(original)
    return TensorEntry(name, dtype, shape, file, start, nbytes, blocks=blocks)


def _placed(file: Path, found: list[TensorEntry], base: int, alignment: int, size: int) -> dict[str, TensorEntry]:
    """Tensors by name, at their places in the file, which they must tile but for the padding."""
    position = 0
    for entry in sorted(found, key=lambda e: e.start):
        if entry.start != position:
            raise ValueError(f"tensor {entry.name} overlaps another or leaves a gap")
        end = position + entry.stored_nbytes
        position = _roundup(end, alignment)
        if base + end > size:
            raise CalibQuantError(f"{file}: is truncated ({size} of {base + end} bytes): download it again")
    if size - base >= position + alignment:
        raise CalibQuantError(f"{file}: has {size - base - position} bytes after the last tensor: download it again")
    entries = {entry.name: replace(entry, start=base + entry.start) for entry in found}
    if len(entries) < len(found):
        raise ValueError("a tensor occurs twice")
    return entries


def _roundup(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
