"""The headers of safetensors files: which tensors, where, and all that can be wrong with them. No torch.

Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
(github.com/huggingface/safetensors, "Format"). Own code instead of ``safetensors.safe_open`` because that maps the
file (a 22 GB map fails on Windows) and its errors name neither file nor remedy. Without torch, because importing
torch takes longer than reading the header of any model.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibQuantError
from .disk import check_input, reason, stat_of
from .text import parse_json, read_text

if TYPE_CHECKING:
    from typing_extensions import Self

# Name in the header -> bytes per element. F8_E8M0 is known so that a quantized source gets a clear answer.
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the reference implementation's own limit
MAX_NAME = 1000  # characters of a tensor's name; the longest seen has 120
MAX_RANK = 32


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: header dtype name, shape, file, absolute byte range.

    A tensor that is not stored as one has ``parts``: its bytes are theirs, one after the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    parts: tuple[TensorEntry, ...] = ()


class Headers:
    """A safetensors file, a sharded ``*.safetensors.index.json`` or a folder with one; only headers are read.

    ``entries`` keeps the order of the files; ``metadata`` is the header's ``__metadata__`` (str -> str; of several
    shards the first that has a key wins). Raises CalibQuantError for anything wrong with a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files_of(self.path)
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        self._nbytes = 0
        for file in self.files:
            entries, metadata, size = read_header(file)
            self._nbytes += size
            for name, entry in entries.items():
                if name in self.entries:
                    raise CalibQuantError(f"{file}: tensor {name} is also in {self.entries[name].file}: remove one")
                self.entries[name] = entry
            self.metadata = {**metadata, **self.metadata}
        _check_index(self.path, self.entries)
        self._handles: dict[tuple[int, Path], Any] = {}  # one per thread and file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def nbytes(self) -> int:
        """Bytes on disk of all files (when they were opened: they may be gone by now)."""
        return self._nbytes

    def fingerprint(self) -> str:
        """SHA-256 over the headers and 64 pieces of 4 kB spread over the data: tells fine-tunes apart in no time."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                _fingerprint(file, digest)
            except OSError as e:
                raise CalibQuantError(f"{file}: cannot be read: {reason(e)}") from e
        return digest.hexdigest()

    def entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CalibQuantError(f"{self.path}: has no tensor {name}: check that the file is complete")
        return self.entries[name]

    def read_bytes(self, name: str) -> bytes:
        """A whole (small) tensor as bytes."""
        entry = self.entry(name)
        buffer = bytearray(entry.nbytes)
        self.read_into(entry, 0, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the tensor's bytes from ``offset`` on."""
        for part in entry.parts or (entry,):
            if offset < part.nbytes and target:
                size = min(part.nbytes - offset, len(target))
                self._read_stored(part, offset, target[:size])
                target = target[size:]
            offset = max(0, offset - part.nbytes)

    def _read_stored(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        key = (threading.get_ident(), entry.file)
        try:
            if key not in self._handles:
                self._handles[key] = open(entry.file, "rb", buffering=0)
            handle = self._handles[key]
            handle.seek(entry.start + offset)
            done = 0
            while done < len(target):
                got = handle.readinto(target[done:])
                if not got:
                    raise CalibQuantError(f"{entry.file}: ends inside tensor {entry.name}: download it again")
                done += got
        except OSError as e:
            raise CalibQuantError(f"{entry.file}: cannot read tensor {entry.name}: {reason(e)}") from e


def _fingerprint(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        digest.update(f.read(length))
        for i in range(64):
            f.seek(8 + length + (size - 8 - length) * i // 64)
            digest.update(f.read(4096))


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
    """Entries and metadata of one safetensors file, fully checked against the file's size, which comes third."""
    check_input(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CalibQuantError(_not_safetensors(file, size, length))
            raw = f.read(length)
    except OSError as e:
        raise CalibQuantError(f"{file}: cannot be read: {reason(e)}") from e
    damaged, remedy = f"{file}: the safetensors header is damaged", "download the file again"
    header = parse_json(raw, damaged, remedy)
    try:
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CalibQuantError(f"{damaged} ({e}): {remedy}") from e
    _check_extent(file, entries, 8 + length, size)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CalibQuantError(f"{file}: __metadata__ in the header must map text to text: save the file again")
    return entries, metadata, size


def _entry(file: Path, name: str, value: Mapping[str, Any], base: int) -> TensorEntry:
    if len(name) > MAX_NAME or not name.isprintable():  # nothing downstream need fear a name
        raise ValueError(f"{name[:40]!r} is no name of a tensor")
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ITEMSIZE:
        raise CalibQuantError(f"{file}: tensor {name} has dtype {dtype}, which is not known here: convert it first")
    if len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has a bad shape or offset")
    if math.prod(max(n, 1) for n in shape) >= 2**63 or stop - start != math.prod(shape) * ITEMSIZE[dtype]:
        raise ValueError(f"tensor {name} has {stop - start} bytes, its shape and dtype want another number")
    return TensorEntry(name, dtype, shape, file, base + start, stop - start)


def _check_extent(file: Path, entries: Mapping[str, TensorEntry], base: int, size: int) -> None:
    """Tensors must tile the rest of the file: anything else is a truncated download or a foreign file."""
    position = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise CalibQuantError(
                f"{file}: tensor {entry.name} overlaps another or leaves a gap: download the file again"
            )
        position += entry.nbytes
    if position > size:
        raise CalibQuantError(f"{file}: is truncated ({size} of {position} bytes): download it again")
    if position < size:
        raise CalibQuantError(f"{file}: has {size - position} bytes after the last tensor: download it again")


def _not_safetensors(file: Path, size: int, length: int) -> str:
    if size == 0:
        return f"{file}: is empty: download it again"
    if size < 10:
        return f"{file}: has {size} bytes, too few for a safetensors file: download it again"
    return (
        f"{file}: is no safetensors file or is truncated (header of {length} bytes in a file of {size}): "
        "give a .safetensors file"
    )


def _files_of(path: Path) -> list[Path]:
    if os.path.isdir(path):
        found = _candidates(path)
        if len(found) != 1:
            what = "no .safetensors file" if not found else f"{len(found)} candidates"
            raise CalibQuantError(f"{path}: {what} in this folder: name one file")
        return _files_of(found[0])
    check_input(path)
    if path.name.endswith(".json"):
        shards = [path.parent / name for name in dict.fromkeys(_weight_map(path).values())]
        for shard in shards:
            if stat_of(shard) is None:
                raise CalibQuantError(f"{shard}: this shard of {path.name} is missing: download it")
        return shards
    return [path]


def _candidates(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise CalibQuantError(f"{folder}: cannot be read: {reason(e)}: check its permissions") from e
    indexes = [folder / name for name in names if name.endswith(".safetensors.index.json")]
    return indexes or [folder / name for name in names if name.endswith(".safetensors")]


def _weight_map(index: Path) -> dict[str, str]:
    problem, remedy = f"{index}: is no safetensors index", "give a .safetensors file"
    content = parse_json(read_text(index), problem, remedy)
    try:
        weight_map = content["weight_map"]
        if not all(isinstance(v, str) and v.endswith(".safetensors") and _is_name(v) for v in weight_map.values()):
            raise ValueError("weight_map must name .safetensors files beside the index")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CalibQuantError(f"{problem} ({e}): {remedy}") from e


def _is_name(text: str) -> bool:
    return text.isprintable() and Path(text).name == text and "\\" not in text


def _check_index(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    if os.path.isdir(path):
        path = _candidates(path)[0]
    if path.name.endswith(".json"):
        for name, shard in _weight_map(path).items():
            if name not in entries or entries[name].file.name != shard:
                raise CalibQuantError(f"{path}: tensor {name} is not in {shard}: download that shard again")
