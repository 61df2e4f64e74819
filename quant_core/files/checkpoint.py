"""Tensors in and out: one streaming reader and one streaming writer of safetensors files.

Own writer, because safetensors' wants every tensor in memory at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import CalibQuantError
from .disk import NewFile, abandoned, check_output, reason
from .header import MAX_HEADER, Headers
from .journal import Journal, first_line

# Name in the header -> torch dtype.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPY_CHUNK = 8 << 20  # bytes
HASH_PLACEHOLDER = "0" * 64


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Headers):
    """Headers whose tensors can be read."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own memory, in the dtype it has on disk."""
        entry = self.entry(name)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_into(entry, 0, memoryview(buffer.numpy()))
        return buffer.view(DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's raw bytes, a few MB at a time."""
        entry = self.entry(name)
        buffer = memoryview(bytearray(min(COPY_CHUNK, entry.nbytes)))
        for offset in range(0, entry.nbytes, COPY_CHUNK):
            part = buffer[: min(COPY_CHUNK, entry.nbytes - offset)]
            self.read_into(entry, offset, part)
            yield part


class Hasher:
    """SHA-256 over the bytes of all files in order, in a thread beside the work (hashlib frees the GIL)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._stop = False
        self._error: OSError | None = None
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        buffer = memoryview(bytearray(1 << 20))
        try:
            for file in self._files:
                with open(file, "rb", buffering=0) as f:
                    while (got := f.readinto(buffer)) and not self._stop:
                        self._digest.update(buffer[:got])
        except OSError as e:
            self._error = e

    def result(self) -> str:
        """Waits; 64 hex digits."""
        self._thread.join()
        if self._error:
            raise CalibQuantError(f"{self._error.filename}: cannot be read: {reason(self._error)}")
        return self._digest.hexdigest()

    def cancel(self) -> None:
        self._stop = True
        self._thread.join()


def make_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Length prefix plus header, and each tensor's absolute offset. A pure function: equal input, equal bytes.

    Wider dtypes come first so that every tensor is aligned to its element size, as the reference writer does.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, offsets = 0, {}
    for spec in sorted(specs, key=lambda s: -s.dtype.itemsize):  # stable: the given order within a width
        offsets[spec.name] = position
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise CalibQuantError(f"the header would have {len(raw)} bytes, more than the format's {MAX_HEADER}")
    base = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: base + offset for name, offset in offsets.items()}


def file_size(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Exact bytes of the file that a Writer with these arguments makes."""
    specs = list(specs)
    return len(make_header(specs, metadata)[0]) + sum(s.nbytes for s in specs)


class Writer:
    """Writes tensor by tensor under a temporary name and renames on success (``NewFile``); use as a context manager.

    Leaving the block with an exception (a cancel included) removes the temporary file; what a killed run leaves is
    removed by the next one. The final name never holds an unfinished file.

    job: what decides every byte of the file. With one, what a killed run of the same job leaves is gone on with, and
    the parts (``write_part``) that it had finished are there already (``kept``).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        overwrite: bool = False,
        job: str = "",
    ) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._specs = {spec.name: spec for spec in specs}
        self._header, self._offsets = make_header(self._specs.values(), metadata)
        self._missing = set(self._specs)
        check_target(self.path, self.size, overwrite)
        line = first_line(job, self._header) if job else b""
        self._new = NewFile(self.path, line)
        try:
            self._journal = Journal(self._new.journal, line, self._new.continued) if job else None
            self._put(0, [self._header])
        except BaseException:
            self._new.discard()
            raise

    @property
    def size(self) -> int:
        return len(self._header) + sum(spec.nbytes for spec in self._specs.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CalibQuantError(
                f"{self.path}: tensor {name} came out as {tensor.dtype} {tuple(tensor.shape)}, planned was "
                f"{spec.dtype} {spec.shape}: make a new plan for this source"
            )
        self.write_chunks(name, [_bytes_of(tensor)])

    def write_part(self, part: str, tensors: Mapping[str, torch.Tensor], note: Any) -> None:
        """Tensors that are made together. Whoever continues the file after a kill gets the note, JSON, back."""
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            self.write(name, tensor)
            if self._journal:
                digest.update(_bytes_of(tensor))
        if self._journal:
            self._put(0, [])
            self._journal.add(part, list(tensors), digest.hexdigest(), note)

    def kept(self, part: str) -> Any | None:
        """The note of a part that a killed run had finished and that is whole: it need not be written. None: it must.

        May be called while another thread writes other parts.
        """
        found = self._journal.parts.get(part) if self._journal else None
        if found is None or self._hash(found.tensors) != found.sha256:
            return None
        self._missing.difference_update(found.tensors)
        return found.note

    def _hash(self, names: Iterable[str]) -> str:
        """SHA-256 over these tensors' bytes as they are on the disk."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(COPY_CHUNK))
        try:
            with open(self._new.path, "rb", buffering=0) as file:
                for name in names:
                    file.seek(self._offsets[name])
                    left = self._specs[name].nbytes
                    while left and (got := file.readinto(buffer[:left])):
                        digest.update(buffer[:got])
                        left -= got
        except OSError:  # then it is written again
            return ""
        return digest.hexdigest()

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Raw bytes of one tensor, in order."""
        self._put(self._offsets[name], chunks)
        self._missing.discard(name)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the header by one of exactly the same length (a hash known only at the end)."""
        header, _ = make_header(self._specs.values(), metadata)
        if len(header) != len(self._header):
            raise ValueError("the header must keep its length")
        self._put(0, [header])

    def _put(self, offset: int, chunks: Iterable[bytes | memoryview]) -> None:
        try:
            self._new.file.seek(offset)  # writes what is buffered, so a full disk may show here
            for chunk in chunks:
                self._new.file.write(chunk)
        except OSError as e:
            raise CalibQuantError(f"{self.path}: cannot be written: {reason(e)}") from e

    def finished(self) -> Path:
        """The complete file under its temporary name, to be checked before it gets its own."""
        if self._missing:
            raise CalibQuantError(f"{self.path}: {len(self._missing)} tensors were never written: {min(self._missing)}")
        self._put(0, [])
        return self._new.path

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finished()
                self._new.publish(self._overwrite)
        finally:
            self._new.discard()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def check_target(path: Path, size: int, overwrite: bool) -> None:
    """Everything that can be known to be wrong with an output before the work starts."""
    if path.suffix != ".safetensors":
        raise CalibQuantError(f"{path}: the output must be named *.safetensors")
    check_output(path, overwrite)
    try:
        free = shutil.disk_usage(path.parent).free + (abandoned(path) or 0)  # which is removed or continued
    except OSError as e:
        raise CalibQuantError(f"{path.parent}: cannot be written: {reason(e)}") from e
    if free < size:
        raise CalibQuantError(f"{path}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room")
