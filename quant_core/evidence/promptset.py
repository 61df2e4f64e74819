"""Prompts encoded once: conditionings with their texts, in one safetensors file.

``N.cond`` and optional ``N.<option>`` are tensors; prompt texts and options that are plain values are in the header.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from ..errors import CalibQuantError
from ..files.checkpoint import Checkpoint, TensorSpec, Writer
from ..files.text import parse_json

METADATA_KEY = "calibquant_promptset"
Prompt = dict[str, Any]  # {"text", "cond": float [1, tokens, width], "options": pooled_output and alike}


def save(prompts: list[Prompt], path: str | os.PathLike[str]) -> None:
    """Write a file that :func:`load` reads, atomically; a file of that name is replaced."""
    tensors: dict[str, torch.Tensor] = {}
    values: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        options = {"cond": prompt["cond"], **prompt["options"]}
        tensors |= {f"{i}.{name}": value for name, value in options.items() if isinstance(value, torch.Tensor)}
        values.append({name: value for name, value in options.items() if not isinstance(value, torch.Tensor)})
    try:
        header = json.dumps({"prompts": [p["text"] for p in prompts], "options": values}, ensure_ascii=False)
    except TypeError as e:
        raise CalibQuantError(
            f"{path}: the text encoder returns something that cannot be saved ({e}): link its "
            "CONDITIONING to Calibrate instead"
        ) from e
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Writer(path, specs, {METADATA_KEY: header}, overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read and check the prompts of a file; CalibQuantError when it is no prompt set or names the damaged prompt."""
    with Checkpoint(path) as file:
        problem, remedy = f"{file.path}: is no prompt set", "choose a file saved by this pack"
        header = parse_json(file.metadata.get(METADATA_KEY, "null"), problem, remedy)
        texts = header.get("prompts") if isinstance(header, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise CalibQuantError(f"{problem} (it has no list of prompts): {remedy}")
        values = header.get("options") or [{}] * len(texts)
        if not isinstance(values, list) or [type(v) for v in values] != [dict] * len(texts):
            raise CalibQuantError(f"{problem} (it must have one object of options per prompt): {remedy}")
        names: dict[str, list[str]] = {}
        for key in file.entries:
            number, _, name = key.partition(".")
            names.setdefault(number, []).append(name)
        return [{"text": text, **_prompt(file, i, names.get(str(i), []), values[i])} for i, text in enumerate(texts)]


def _prompt(file: Checkpoint, index: int, names: list[str], values: dict[str, Any]) -> Prompt:
    if "cond" not in names:
        raise CalibQuantError(f"{file.path}: prompt {index} has no tensor {index}.cond: save the set again")
    tensors = {name: file.read(f"{index}.{name}") for name in names}
    cond = tensors.pop("cond")
    if cond.dim() != 3 or not cond.numel() or not cond.is_floating_point() or not cond.float().isfinite().all():
        raise CalibQuantError(
            f"{file.path}: prompt {index} has a cond of {cond.dtype} {list(cond.shape)} (wanted are finite floats "
            "[1, tokens, width]): save the set again"
        )
    return {"cond": cond, "options": {**tensors, **values}}
