"""Model files in *diffusers* layout, seen as ComfyUI names and joins their tensors. Headers only, no torch.

While it loads such a file, ComfyUI renames tensors and joins some (q, k and v become one), and what a quantized one
consists of beside its codes is lost. So the file we write must be in ComfyUI's own layout, and everything from the plan
on sees the source in it: ``present`` gives a file's entries the names ComfyUI gives them. No byte is copied: a joined
tensor is a list of stored ones (``TensorEntry.parts``). The tables lie in ``layouts``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import CalibQuantError
from ..files.header import Headers, TensorEntry
from .architectures import split_prefix
from .layouts import FOREIGN, LAYOUTS, Layout

Stored = Mapping[str, TensorEntry]  # without prefix


def present(file: Headers) -> str:
    """Make ``file.entries`` those of ComfyUI's own layout. Returns what they were converted from, "" if nothing was.

    Raises CalibQuantError for a diffusers layout that is not converted here, or not all of it.
    """
    prefix = split_prefix(file.entries)
    stored = {name.removeprefix(prefix): entry for name, entry in file.entries.items() if name.startswith(prefix)}
    layout = next((r for r in LAYOUTS if all(mark in stored for mark in r.marks) and r.unless not in stored), None)
    if layout is None:
        _refuse_foreign(file.path, stored)
        return ""
    entries = {name: entry for name, entry in file.entries.items() if not name.startswith(prefix)}
    for name, entry in _converted(file.path, layout, stored).items():
        entries[prefix + name] = replace(entry, name=prefix + name)
    file.entries = dict(sorted(entries.items()))  # in which safetensors would have written them
    return layout.title


_REMEDY = "use the 16-bit model in ComfyUI's layout (its single-file release), or save it from ComfyUI with ModelSave"


def _refuse_foreign(path: Path, stored: Stored) -> None:
    for pattern, unless in FOREIGN:
        found = next((key for key in stored if re.match(pattern, key)), None)
        if found and unless not in stored:
            known = ", ".join(row.title for row in LAYOUTS)
            raise CalibQuantError(f"{path}: is in a diffusers layout (it has {found}) other than {known}: {_REMEDY}")


# --- converting

_NUMBER = re.compile(r"((?<![a-z_])blocks|transformer_blocks|vace_blocks|layers|refiner)\.(\d+)\.")
Part = tuple[str, str]  # stored key, "" or "[1/2]" or "[2/2]"


def _converted(path: Path, layout: Layout, stored: Stored) -> dict[str, TensorEntry]:
    rows = {part.partition("[")[0]: row for row in layout.table(stored).items() for part in row[1].split()}
    wanted: dict[str, list[Part]] = {}
    for key in stored:
        name, parts = _place(key, rows) or (key if re.match(layout.kept, key) else "", [(key, "")])
        if not name or wanted.setdefault(name, parts) != parts:
            raise CalibQuantError(
                f"{path}: is in the diffusers layout of {layout.title}, but ComfyUI's has no place for {key}: {_REMEDY}"
            )
    return {name: _joined(path, name, [_part(path, stored, part) for part in parts]) for name, parts in wanted.items()}


def _place(key: str, rows: Mapping[str, tuple[str, str]]) -> tuple[str, list[Part]] | None:
    """ComfyUI's key for a stored one, with all parts of that tensor."""
    name, dot, end = key.rpartition(".")
    if end not in ("weight", "bias"):
        name, dot, end = key, "", ""
    row = rows.get(name) or rows.get(_NUMBER.sub(r"\1.*.", name, count=1))
    if row is None:
        return None
    block = _NUMBER.search(name)
    native, parts = (text.replace("*", block[2] if block else "*") for text in row)
    halves = [part.partition("[") for part in parts.split()]
    return native + dot + end, [(stored + dot + end, bracket + half) for stored, bracket, half in halves]


def _part(path: Path, stored: Stored, part: Part) -> TensorEntry:
    key, half = part
    if key not in stored:
        raise CalibQuantError(f"{path}: has no tensor {key}: check that the file is complete")
    entry = stored[key]
    if not half:
        return entry
    if not entry.shape or entry.shape[0] % 2 or entry.blocks:
        raise CalibQuantError(f"{path}: tensor {key} of shape {entry.shape} has no two halves: {_REMEDY}")
    rows, nbytes = entry.shape[0] // 2, entry.nbytes // 2
    start = entry.start + (nbytes if half == "[2/2]" else 0)
    return replace(entry, shape=(rows, *entry.shape[1:]), start=start, nbytes=nbytes)


def _joined(path: Path, name: str, parts: list[TensorEntry]) -> TensorEntry:
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(part.shape for part in parts) or len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        names = ", ".join(part.name for part in parts)
        raise CalibQuantError(f"{path}: ComfyUI joins {names} to {name}, but they differ in dtype or width: {_REMEDY}")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(first, name=name, shape=shape, nbytes=sum(part.nbytes for part in parts), parts=tuple(parts))
