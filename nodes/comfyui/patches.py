"""What a MODEL is made of (family, source file, LoRA patches), and what its loader can read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.quant_ops
import comfy.utils
import comfyui_version
import torch

from ...quant_core.errors import CalibQuantError
from ...quant_core.files.header import Headers
from ...quant_core.models.architectures import Architecture, detect
from ...quant_core.models.source import Source
from ...quant_core.planning import targets
from ...quant_core.planning.plan import Plan
from ...quant_core.rounding import smoothing
from .sampling import Stage, Stages

CORE = Path(comfy.quant_ops.__file__).resolve().parents[1]  # the running ComfyUI
_MODEL_KEY = "diffusion_model."


def check_core(plan: Plan) -> list[str]:
    """What the running ComfyUI cannot load of a plan; CalibQuantError for what it would draw noise from."""
    return targets.check_core(plan, CORE)


def require_pre_quant_scale() -> None:
    """CalibQuantError when this ComfyUI's loader ignores ``pre_quant_scale``, and would render noise for it."""
    if targets.SMOOTHED.missing(CORE):
        raise CalibQuantError(
            f"this ComfyUI ({comfyui_version.__version__}) ignores {smoothing.KEY}: switch it off, or update ComfyUI"
        )


def lora_merge(model: Any, source: Source) -> tuple[dict[str, Callable[[torch.Tensor], torch.Tensor]], str]:
    """The MODEL's patches as functions on the source file's float32 tensors, and a digest of them.

    Raises CalibQuantError when the MODEL was not loaded from this file, patched or not, or runs what is no patch.
    """
    if source.architecture.part == "te":
        raise CalibQuantError(f"{source.path}: is a text encoder, which no MODEL has LoRAs for: unlink the MODEL")
    _check_origin(model, source)
    if model.injections:
        raise CalibQuantError(
            f"{source.path}: the linked MODEL runs a bypass LoRA or a split's branch beside its layers, which "
            "changes no weight and would be lost: load LoRAs by Load LoRA (Model Only)"
        )
    merge, digest = {}, hashlib.sha256()
    for key in sorted(model.patches):
        name = source.prefix + key.removeprefix(_MODEL_KEY)
        entry = source.checkpoint.entries.get(name)
        expected = getattr(comfy.utils.get_attr(model.model, key), "shape", None) if entry else None
        if entry is None or tuple(expected or entry.shape) != entry.shape:
            raise CalibQuantError(
                f"{source.path}: tensor {name}, which the linked MODEL patches, is not in this file: "
                "load the MODEL from the same file"
            )
        merge[name] = _patcher(model.patches[key], key)
        digest.update(key.encode())
        _digest(digest, model.patches[key])
    return merge, digest.hexdigest() if merge else ""


def source_path(model: Any) -> Path:
    """The file that the MODEL was loaded from; CalibQuantError when it does not say which."""
    path = path_of(model)
    if path is None or not _source_of(model):
        raise CalibQuantError(
            "the linked MODEL does not say which file it was loaded from: load it with Load Diffusion Model or Load "
            "Checkpoint, or unlink it and choose model_name"
        )
    return path


def leaves_trail(model: Any) -> bool:
    """Whether the MODEL says which file it was loaded from. Of one that does not, only names and shapes are known."""
    return bool(_source_of(model))


def _check_origin(model: Any, source: Source) -> None:
    trail = _source_of(model)
    if trail and trail["source_fingerprint"] != source.checkpoint.fingerprint():
        raise CalibQuantError(
            f"{source.path}: the linked MODEL was loaded from another file ({trail['source_file']}): choose the same "
            "file in both nodes"
        )
    if not trail and not source.dialect and is_quantized(model):
        raise CalibQuantError(f"{source.path}: the linked MODEL is quantized already: load it from this file")


def is_quantized(model: Any) -> bool:
    """Whether any tensor of the MODEL is stored in a quantized format."""
    return any(isinstance(p, comfy.quant_ops.QuantizedTensor) for p in model.model.diffusion_model.parameters())


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
    elif isinstance(value, dict):
        _digest(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, (int, float, str, type(None))):
        digest.update(repr(value).encode())


# --- sampling: which model, watched by whom, drawn how


def identify(model: Any) -> tuple[Architecture, dict[str, Any]]:
    """The MODEL's row of the architecture table, and its identity for a calibration's header.

    ``source_file`` and ``source_fingerprint`` are absent when the loader left no trace of its file.
    """
    tensors = model.model.diffusion_model.named_parameters()
    shapes = {name.replace("_orig_mod.", ""): tuple(tensor.shape) for name, tensor in tensors}
    architecture = detect(shapes, shapes)
    return architecture, {
        "architecture": architecture.name,
        "comfyui": comfyui_version.__version__,
        **_source_of(model),
    }


def job(models: Iterable[tuple[Any, int]], *values: Any) -> str:
    """SHA-256 of what decides a sampling job: MODELs with their patches, sigmas and first steps; and the values."""
    digest = hashlib.sha256()
    for model, start in models:
        sigmas = getattr(model.get_model_object("model_sampling"), "sigmas", None)
        _digest(digest, [start, *_source_of(model).values(), model.patches, sigmas])
    _digest(digest, list(values))
    return digest.hexdigest()


def stage_of(stages: Stages, fingerprint: str | None) -> Stage:
    """The stage whose model was loaded from this file; the first where that is unknown."""
    found = [s for s in stages[1:] if fingerprint and _source_of(s.model).get("source_fingerprint") == fingerprint]
    return (found or stages)[0]


def path_of(model: Any) -> Path | None:
    """The file that the MODEL was loaded from; None when the loader left no trace of it."""
    return next(iter(paths_of(model)), None)


def paths_of(patcher: Any) -> list[Path]:
    """The files that a patcher's model was loaded from: one, but a CLIP's may be several."""
    loader = getattr(patcher, "cached_patcher_init", None)  # (function, its arguments …), set by comfy.sd's loaders
    first = next(iter(loader[1]), None) if loader else None
    return [Path(path) for path in ([first] if isinstance(first, str) else first or []) if isinstance(path, str)]


def _source_of(model: Any) -> dict[str, str]:
    path = path_of(model)
    if path is None:
        return {}
    try:
        with Headers(path) as source:
            return {"source_file": source.path.name, "source_fingerprint": source.fingerprint()}
    except (CalibQuantError, OSError):  # no safetensors file
        return {}
