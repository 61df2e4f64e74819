"""Everything that touches ComfyUI's internals: folders, progress and cancel, LoRA patches, text on a node.

A change in ComfyUI should touch this file of ours and no other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from server import PromptServer

from ..quant_core.errors import CalibQuantError
from ..quant_core.source import Source

PACK = Path(__file__).resolve().parent.parent
CATEGORY = "quantization/CalibQuant"
PROMPT_SETS = "calibquant_promptsets"
CHECKPOINTS = "checkpoints/"  # how an all-in-one checkpoint is told from a diffusion model in a list of both
_MODEL_KEY = "diffusion_model."

PlanType = io.Custom("CALIBQUANT_PLAN")
ReportType = io.Custom("CALIBQUANT_REPORT")
ConditioningSetType = io.Custom("CALIBQUANT_CONDITIONING_SET")


def register_folders() -> None:
    """Make the demo model, its VAE and its prompts selectable in the stock loaders without copying."""
    folder_paths.add_model_folder_path("diffusion_models", str(PACK / "workflows" / "models"))
    folder_paths.add_model_folder_path("vae", str(PACK / "workflows" / "vae"))
    own = os.path.join(folder_paths.models_dir, PROMPT_SETS)
    folder_paths.add_model_folder_path(PROMPT_SETS, own, is_default=True)
    folder_paths.add_model_folder_path(PROMPT_SETS, str(PACK / "workflows" / "promptsets"))
    folder_paths.folder_names_and_paths[PROMPT_SETS][1].add(".safetensors")


def model_names() -> list[str]:
    """Every file that can be a source: diffusion models, then all-in-one checkpoints as ``checkpoints/NAME``."""
    checkpoints = [CHECKPOINTS + name for name in folder_paths.get_filename_list("checkpoints")]
    names = folder_paths.get_filename_list("diffusion_models") + checkpoints
    return [name for name in names if name.endswith(".safetensors")]


def model_path(name: str) -> Path:
    """The file behind a name of :func:`model_names`."""
    found = folder_paths.get_full_path("diffusion_models", name)
    if found is None and name.startswith(CHECKPOINTS):
        found = folder_paths.get_full_path("checkpoints", name.removeprefix(CHECKPOINTS))
    if found is None:
        raise CalibQuantError(f"{name}: no such model: choose one from the list (press R to refresh it)")
    return Path(found)


def fingerprint(name: str) -> str:
    """Changes when the file behind the name does."""
    try:
        stat = model_path(name).stat()
    except (CalibQuantError, OSError):
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def prompt_set_names() -> list[str]:
    return folder_paths.get_filename_list(PROMPT_SETS)


def prompt_set_path(name: str) -> Path:
    found = folder_paths.get_full_path(PROMPT_SETS, name)
    if found is None:
        raise CalibQuantError(f"{name}: no such prompt set: choose one from the list")
    return Path(found)


def output_path(prefix: str, model_name: str) -> tuple[Path, str]:
    """A file name not yet taken in ComfyUI's output folder, and the name under which a stock loader finds it."""
    kind = "checkpoints" if model_name.startswith(CHECKPOINTS) else "diffusion_models"
    parts = prefix.replace("\\", "/").strip("/").split("/")
    if not parts[-1] or ".." in parts:
        raise CalibQuantError(
            f"filename_prefix {prefix!r} is no name inside output/{kind}: use one like calibquant/model"
        )
    root = folder_paths.get_output_directory()
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(f"{kind}/{prefix}", root)
    os.makedirs(folder, exist_ok=True)
    name = f"{stem}_{counter:05}_.safetensors"
    inside = Path(subfolder).relative_to(kind) / name
    return Path(folder) / name, str(inside)


def progress(total_parts: int = 1) -> Callable[[int], Callable[[int, int, str], None]]:
    """The engine's progress protocol on ComfyUI's progress bar; a cancel raises out of the engine at once.

    One bar over ``total_parts`` jobs of equal weight: ``progress(2)(0)`` is the function for the first half.
    """
    bar = comfy.utils.ProgressBar(1000 * total_parts)

    def part(index: int) -> Callable[[int, int, str], None]:
        def update(done: int, total: int, _text: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(1000 * index + 1000 * done // max(total, 1), 1000 * total_parts)

        return update

    return part


def show(node_id: str | None, text: str) -> None:
    """Text on the node while it works: event ``calibquant.text`` {node, text}, drawn by js/calibquant.js."""
    if node_id and PromptServer.instance is not None:
        PromptServer.instance.send_sync("calibquant.text", {"node": node_id, "text": text})


def lora_merge(model: Any, source: Source) -> tuple[dict[str, Callable[[torch.Tensor], torch.Tensor]], str]:
    """The MODEL's patches as functions on the source file's float32 tensors, and a digest of them.

    Raises CalibQuantError when the MODEL was not loaded from this file.
    """
    merge, digest = {}, hashlib.sha256()
    for key in sorted(model.patches):
        name = source.prefix + key.removeprefix(_MODEL_KEY)
        entry = source.checkpoint.entries.get(name)
        expected = getattr(comfy.utils.get_attr(model.model, key), "shape", None) if entry else None
        if entry is None or tuple(expected or entry.shape) != entry.shape:
            raise CalibQuantError(
                f"{source.path}: tensor {name}, which a LoRA of the linked MODEL patches, is not in this file: "
                "load the MODEL from the same file"
            )
        merge[name] = _patcher(model.patches[key], key)
        digest.update(key.encode())
        _digest(digest, model.patches[key])
    return merge, digest.hexdigest() if merge else ""


def _patcher(patches: list[Any], key: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(weight: torch.Tensor) -> torch.Tensor:
        return comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)

    return add


def _digest(digest: Any, value: Any) -> None:
    """Feed everything that decides a patch's effect: strengths, tensors, nested tuples and adapter objects."""
    if isinstance(value, torch.Tensor):
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(digest, item)
    elif hasattr(value, "weights"):  # comfy.weight_adapter
        digest.update(type(value).__name__.encode())
        _digest(digest, value.weights)
    elif isinstance(value, (int, float, str, type(None))):
        digest.update(repr(value).encode())
