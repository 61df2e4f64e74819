"""The only file access of the engine: one streaming reader and one streaming writer of safetensors files.

Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
(github.com/huggingface/safetensors, "Format"). Own code instead of ``safetensors.safe_open`` because that maps
the file (a 22 GB map fails on Windows) and its writer wants every tensor in memory at once.
"""

from __future__ import annotations

import contextlib
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

from .errors import CalibQuantError

# Name in the header -> torch dtype. F8_E8M0 and F4 are known so that a quantized source gets a clear answer.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the reference implementation's own limit
COPY_CHUNK = 8 << 20  # bytes
HASH_PLACEHOLDER = "0" * 64


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: header dtype name, shape, file, absolute byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A safetensors file, a sharded ``*.safetensors.index.json`` or a folder with one, opened for reading.

    Opening reads headers only. ``entries`` keeps the order of the files; ``metadata`` is the header's
    ``__metadata__`` (str -> str; of several shards the first that has a key wins).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files_of(self.path)
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            entries, metadata = read_header(file)
            for name, entry in entries.items():
                if name in self.entries:
                    raise CalibQuantError(f"{file}: tensor {name} is also in {self.entries[name].file}: remove one")
                self.entries[name] = entry
            self.metadata = {**metadata, **self.metadata}
        _check_index(self.path, self.entries)
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def nbytes(self) -> int:
        """Bytes on disk of all files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own memory, in the dtype it has on disk."""
        entry = self._entry(name)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._read_into(entry, 0, memoryview(buffer.numpy()))
        return buffer.view(DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's raw bytes, a few MB at a time."""
        entry = self._entry(name)
        buffer = memoryview(bytearray(min(COPY_CHUNK, entry.nbytes)))
        for offset in range(0, entry.nbytes, COPY_CHUNK):
            part = buffer[: min(COPY_CHUNK, entry.nbytes - offset)]
            self._read_into(entry, offset, part)
            yield part

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CalibQuantError(f"{self.path}: has no tensor {name}: check that the file is complete")
        return self.entries[name]

    def _read_into(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        try:
            if entry.file not in self._handles:
                self._handles[entry.file] = open(entry.file, "rb", buffering=0)
            handle = self._handles[entry.file]
            handle.seek(entry.start + offset)
            done = 0
            while done < len(target):
                got = handle.readinto(target[done:])
                if not got:
                    raise CalibQuantError(f"{entry.file}: ends inside tensor {entry.name}: download it again")
                done += got
        except OSError as e:
            raise CalibQuantError(f"{entry.file}: cannot read tensor {entry.name}: {e.strerror}") from e


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of one safetensors file, fully checked against the file's size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CalibQuantError(_not_safetensors(file, size, length))
            raw = f.read(length)
    except OSError as e:
        raise CalibQuantError(f"{file}: cannot be read: {e.strerror}") from e
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise CalibQuantError(f"{file}: the safetensors header is damaged ({e}): download the file again") from e
    _check_extent(file, entries, 8 + length, size)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CalibQuantError(f"{file}: __metadata__ in the header must map text to text: save the file again")
    return entries, metadata


def _entry(file: Path, name: str, value: Mapping[str, Any], base: int) -> TensorEntry:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES:
        raise CalibQuantError(f"{file}: tensor {name} has dtype {dtype}, which is not known here: convert it first")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has a bad shape or offset")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name} has {stop - start} bytes, its shape and dtype want another number")
    return TensorEntry(name, dtype, shape, file, base + start, stop - start)


def _check_extent(file: Path, entries: Mapping[str, TensorEntry], base: int, size: int) -> None:
    """Tensors must tile the rest of the file: anything else is a truncated download or a foreign file."""
    position = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise CalibQuantError(f"{file}: tensor {entry.name} overlaps another or leaves a gap: the file is damaged")
        position += entry.nbytes
    if position > size:
        raise CalibQuantError(f"{file}: is truncated ({size} of {position} bytes): download it again")
    if position < size:
        raise CalibQuantError(f"{file}: has {size - position} bytes after the last tensor: the file is damaged")


def _not_safetensors(file: Path, size: int, length: int) -> str:
    if size == 0:
        return f"{file}: is empty: download it again"
    if size < 10:
        return f"{file}: has {size} bytes, too few for a safetensors file: download it again"
    return (
        f"{file}: is no safetensors file or is truncated (header of {length} bytes in a file of {size}): "
        "give a .safetensors file"
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            what = "no .safetensors file" if not found else f"{len(found)} candidates"
            raise CalibQuantError(f"{path}: {what} in this folder: name one file")
        return _files_of(found[0])
    if not path.exists():
        raise CalibQuantError(f"{path}: no such file")
    if path.name.endswith(".json"):
        shards = [path.parent / name for name in dict.fromkeys(_weight_map(path).values())]
        for shard in shards:
            if not shard.exists():
                raise CalibQuantError(f"{shard}: this shard of {path.name} is missing: download it")
        return shards
    return [path]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        if not all(isinstance(v, str) and Path(v).name == v for v in weight_map.values()):
            raise ValueError("weight_map must name files beside the index")
        return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CalibQuantError(f"{index}: is no safetensors index ({e}): give a .safetensors file") from e


def _check_index(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json"))
        path = found[0] if found else path
    if path.name.endswith(".json"):
        for name, shard in _weight_map(path).items():
            if name not in entries or entries[name].file.name != shard:
                raise CalibQuantError(f"{path}: tensor {name} is not in {shard}: download that shard again")


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
            raise CalibQuantError(f"{self._error.filename}: cannot be read: {self._error.strerror}")
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
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
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
    """Writes ``OUT.partial`` tensor by tensor and renames it to ``OUT`` on success; use as a context manager.

    Leaving the block with an exception (a cancel included) removes the partial file; after a kill it stays
    behind under its own name, and the next run replaces it. The final name never holds an unfinished file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._specs = {spec.name: spec for spec in specs}
        self._header, self._offsets = make_header(self._specs.values(), metadata)
        self._missing = set(self._specs)
        check_target(self.path, self.size, overwrite)
        try:
            self._file = open(self.partial, "wb")
            self._file.write(self._header)
        except OSError as e:
            raise CalibQuantError(f"{self.partial}: cannot be written: {e.strerror}") from e

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
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.write_chunks(name, [memoryview(flat.numpy())])

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Raw bytes of one tensor, in order."""
        try:
            self._file.seek(self._offsets[name])
            for chunk in chunks:
                self._file.write(chunk)
        except OSError as e:
            raise CalibQuantError(f"{self.partial}: cannot be written: {e.strerror}") from e
        self._missing.discard(name)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the header by one of exactly the same length (a hash known only at the end)."""
        header, _ = make_header(self._specs.values(), metadata)
        if len(header) != len(self._header):
            raise ValueError("the header must keep its length")
        self._file.seek(0)
        self._file.write(header)

    def commit(self) -> None:
        if self._missing:
            raise CalibQuantError(f"{self.path}: {len(self._missing)} tensors were never written: {min(self._missing)}")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError as e:
            raise CalibQuantError(f"{self.path}: cannot be written: {e.strerror}") from e
        _sync_folder(self.path.parent)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise


def check_target(path: Path, size: int, overwrite: bool) -> None:
    """Everything that can be known to be wrong with an output before the work starts."""
    if path.suffix != ".safetensors":
        raise CalibQuantError(f"{path}: the output must be named *.safetensors")
    if path.is_dir():
        raise CalibQuantError(f"{path}: is a folder: name a file")
    if path.exists() and not overwrite:
        raise CalibQuantError(f"{path}: exists already: give another name or --overwrite")
    if not path.parent.is_dir():
        raise CalibQuantError(f"{path.parent}: no such folder: make it first")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CalibQuantError(f"{path}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool = True) -> None:
    """A small text file (plan, report, table), written beside itself and renamed."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise CalibQuantError(f"{path}: exists already: give another name or --overwrite")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, "utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as e:
        raise CalibQuantError(f"{path}: cannot be written: {e.strerror}") from e


def read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibQuantError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
