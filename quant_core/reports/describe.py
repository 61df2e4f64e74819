"""What a file is, from its headers alone. No torch, so that `calibquant inspect` answers at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from typing import Any

from ..errors import CalibQuantError
from ..files.header import Headers
from ..files.markers import FP8, branch_of, declared_formats, provenance
from ..models.architectures import detect, split_prefix
from ..models.diffusers import present
from ..models.parts import Part, find


def inspect(path: str | os.PathLike[str], kinds: Collection[str] = ()) -> dict[str, Any]:
    """Architecture, layers per format, bytes and provenance of any checkpoint, from headers only.

    (Inline ``comfy_quant`` tensors are read too, a few bytes per layer.) Layers are those that ComfyUI would see, of
    the chosen kinds of parts (by default the diffusion model alone); ``layout`` says from what they were converted, or
    why they could not be.
    """
    with Headers(path) as file:
        layout = _layout(file)
        prefix = split_prefix(file.entries)
        model = {k: e for k, e in file.entries.items() if k.startswith(prefix)}
        architecture = detect(model, {k: e.shape for k, e in model.items()})
        contents = find(file.entries, Part(architecture.part, prefix, architecture))
        chosen = tuple(part.prefix for part in contents if part.kind in (kinds or [architecture.part]))
        declared = {**declared_formats(file), **declared_formats(file, prefix)}
        layers = {}
        for key, entry in file.entries.items():
            if not key.startswith(chosen):
                continue
            if key.endswith(".weight") and len(entry.shape) == 2:
                layer = key.removesuffix(".weight")
                bare = "float8_e4m3fn_unscaled" if entry.dtype in FP8 else entry.stored
                layers[layer] = {
                    "format": declared.get(layer, bare),
                    "shape": list(entry.shape),
                    "bytes": entry.stored_nbytes,
                }
        return {
            "file": str(file.path),
            "files": len(file.files),
            "bytes": file.nbytes(),
            "tensors": len(file.entries),
            "architecture": architecture.name,
            "architecture_title": architecture.title,
            "layout": layout,
            "prefix": prefix,
            "other_tensors": len(file.entries) - len(model),
            "parts": [_about(file, part) for part in contents],
            "formats": dict(Counter(layer["format"] for layer in layers.values())),
            "dtypes": _bytes_per_dtype(file),
            "layers": layers,
            "split": (branch_of(file) or ("",))[0],
            "provenance": provenance(file),
        }


def _about(file: Headers, part: Part) -> dict[str, Any]:
    dtypes, nbytes = Counter[str](), 0
    for key, entry in file.entries.items():
        if key.startswith(part.prefix):
            dtypes[entry.dtype] += entry.nbytes
            nbytes += entry.nbytes
    row = part.architecture
    return {
        "part": part.kind,
        "title": part.title,
        "prefix": part.prefix,
        "architecture": row.name if row else None,  # None: ComfyUI reads no scales for it in a checkpoint
        "bytes": nbytes,
        "dtypes": dict(dtypes.most_common()),
    }


def _layout(file: Headers) -> str:
    """Convert ``file`` where that can be; "" for ComfyUI's own layout."""
    try:
        title = present(file)
    except CalibQuantError as refused:
        return str(refused).removeprefix(f"{file.path}: ")
    return f"is in diffusers layout ({title}), shown as ComfyUI joins and names its tensors" if title else ""


def _bytes_per_dtype(file: Headers) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for entry in file.entries.values():
        totals[entry.stored] += entry.stored_nbytes
    return dict(totals.most_common())
