"""Where a tensor lies in a file, whatever kind of file that is. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Name in the header -> bytes per element. F8_E8M0 is known so that a quantized source gets a clear answer.
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the safetensors reference implementation's own limit
MAX_NAME = 1000  # characters of a tensor's name; the longest seen has 120
MAX_RANK = 32


@dataclass(frozen=True)
class Blocks:
    """A way to store values in blocks with scales of their own, as GGUF does; decoded to float32 when read."""

    name: str
    values: int  # in a block
    nbytes: int  # of a block
    decode: Callable[[bytearray], bytes | memoryview]  # whole blocks -> their float32 values
    lossy: bool = True  # has lost more than the formats made of it need


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: header dtype name, shape, file, absolute byte range.

    A tensor that is not stored as one has ``parts``: its bytes are theirs, one after the other. Of one stored in
    ``blocks``, dtype and nbytes are those of its decoded values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    parts: tuple[TensorEntry, ...] = ()
    blocks: Blocks | None = None

    @property
    def stored(self) -> str:
        """What the file stores: a dtype, or blocks by their name."""
        return self.blocks.name if self.blocks else self.dtype

    @property
    def stored_nbytes(self) -> int:
        if self.blocks is None:
            return self.nbytes
        return self.nbytes // (ITEMSIZE[self.dtype] * self.blocks.values) * self.blocks.nbytes


@dataclass(frozen=True)
class Header:
    """What the beginning of one file says: its tensors, its text, its size and where its data begin."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int
    base: int
