"""The headers of model files: which tensors, where, and all that can be wrong with them. No torch.

safetensors files are read here, GGUF files in ``gguf``; what else people have is refused by what it is. The format of
safetensors: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
(github.com/huggingface/safetensors, "Format"). Own code instead of ``safetensors.safe_open`` because that maps the
file (a 22 GB map fails on Windows) and its errors name neither file nor remedy. Without torch, because importing
torch takes longer than reading the header of any model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibQuantError
from . import gguf
from .disk import check_input, reason, stat_of
from .entry import ITEMSIZE, MAX_HEADER, MAX_NAME, MAX_RANK, Header, TensorEntry
from .text import parse_json, read_text

if TYPE_CHECKING:
    from typing_extensions import Self

# How files that cannot be read begin -> what they are, and the remedy.
_PICKLE = (
    "is a pickle (PyTorch's .pt, .pth, .ckpt and .bin), which may run any program and is not opened here",
    "get its .safetensors release, or load it in ComfyUI with the stock loader and save it with ModelSave",
)
_FOREIGN = {
    **dict.fromkeys((b"PK\3\4", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6))), _PICKLE),
    b"version https://git-lfs": ("is a Git LFS pointer, not the file itself", "download the file (git lfs pull)"),
}
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")


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
        self._bases: list[int] = []
        for file in self.files:
            header = read_header(file)
            self._nbytes += header.size
            self._bases.append(header.base)
            for name, entry in header.entries.items():
                if name in self.entries:
                    raise CalibQuantError(f"{file}: tensor {name} is also in {self.entries[name].file}: remove one")
                self.entries[name] = entry
            self.metadata = {**header.metadata, **self.metadata}
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
        for file, base in zip(self.files, self._bases, strict=True):
            try:
                _fingerprint(file, base, digest)
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
                if part.blocks:
                    gguf.read_values(part, offset, target[:size], partial(self._read_stored, part))
                else:
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


def _fingerprint(file: Path, base: int, digest: Any) -> None:
    size = file.stat().st_size
    with open(file, "rb") as f:
        f.seek(8)  # behind the header's length, or the magic and version of a GGUF file
        digest.update(f.read(base - 8))
        for i in range(64):
            f.seek(base + (size - base) * i // 64)
            digest.update(f.read(4096))


def read_header(file: Path) -> Header:
    """Entries and metadata of one safetensors or GGUF file, fully checked against the file's size."""
    check_input(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            prefix = f.read(32)
            if prefix.startswith(gguf.MAGIC):
                return gguf.read_header(file, f, size)
            _refuse_foreign(file, prefix)
            f.seek(8)
            prefix = prefix[:8]
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
    return Header(entries, metadata, size, 8 + length)


def _refuse_foreign(file: Path, beginning: bytes) -> None:
    if beginning[8:9] == b"{":  # a safetensors header, whatever its length looks like
        return
    for magic, (problem, remedy) in _FOREIGN.items():
        if beginning.startswith(magic):
            raise CalibQuantError(f"{file}: {problem}: {remedy}")


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
    if file.suffix.lower() in _PICKLES:  # in a form so old that its beginning does not tell
        return f"{file}: {': '.join(_PICKLE)}"
    if size < 10:
        return f"{file}: has {size} bytes, too few for a safetensors file: download it again"
    return (
        f"{file}: is no safetensors file or is truncated (header of {length} bytes in a file of {size}): "
        "give a .safetensors file"
    )


def _files_of(path: Path) -> list[Path]:
    if os.path.isdir(path):
        return _files_of(_only_candidate(path))
    check_input(path)
    if path.name.endswith(".json"):
        shards = [path.parent / name for name in dict.fromkeys(_weight_map(path).values())]
        for shard in shards:
            if stat_of(shard) is None:
                raise CalibQuantError(f"{shard}: this shard of {path.name} is missing: download it")
        return shards
    return [path]


_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=\.)")  # of a file in a diffusers folder
_PIPELINE = "model_index.json"
_MODELS = ("transformer", "transformer_2", "unet")  # folders of a pipeline that hold a diffusion model
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")


def _only_candidate(folder: Path) -> Path:
    """The one model in a folder: of a pipeline its diffusion model, of variants the one without a mark."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise CalibQuantError(f"{folder}: cannot be read: {reason(e)}: check its permissions") from e
    if _PIPELINE in names:
        return _only_candidate(_model_of_pipeline(folder, names))
    found = [name for name in names if re.search(r"\.safetensors\.index\.(\w+\.)?json$", name)]
    found = found or [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = [name for name in found if (plain := _VARIANT.sub("", name)) == name or plain not in found]
    if len(found) == 1 and not _SHARD.search(found[0]):
        return folder / found[0]
    if any(_SHARD.search(name) for name in found):
        problem, remedy = "shards without their index", "download the *.safetensors.index.json that lies beside them"
    elif found:
        problem, remedy = f"{len(found)} candidates in this folder", "name one file"
    elif any(name.endswith(_PICKLES) for name in names):
        problem, remedy = "no .safetensors file in this folder, only pickles", _PICKLE[1]
    else:
        problem, remedy = "no .safetensors file in this folder", "name one file"
    raise CalibQuantError(f"{folder}: {problem}: {remedy}")


def _model_of_pipeline(folder: Path, names: list[str]) -> Path:
    found = [name for name in _MODELS if name in names and os.path.isdir(folder / name)]
    if len(found) == 1:
        return folder / found[0]
    if not found:
        raise CalibQuantError(
            f"{folder}: is a pipeline ({_PIPELINE}) without a folder {' or '.join(_MODELS)}: download it whole, or "
            "name the folder of the part"
        )
    which = " or ".join(str(folder / name) for name in found)
    raise CalibQuantError(f"{folder}: is a pipeline of {len(found)} models: name one of them, {which}")


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
        path = _only_candidate(path)
    if path.name.endswith(".json"):
        for name, shard in _weight_map(path).items():
            if name not in entries or entries[name].file.name != shard:
                raise CalibQuantError(f"{path}: tensor {name} is not in {shard}: download that shard again")
