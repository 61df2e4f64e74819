"""Everything that touches ComfyUI's internals: folders, progress, cancel, LoRA patches, sampling, text on a node.

A change in ComfyUI should touch this file of ours and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.sample
import comfy.samplers
import comfy.utils
import comfyui_version
import folder_paths
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from server import PromptServer

from ..quant_core import smoothing
from ..quant_core.architectures import Architecture, detect
from ..quant_core.calibration import Collector
from ..quant_core.errors import CalibQuantError
from ..quant_core.header import Headers
from ..quant_core.source import Source

PACK = Path(__file__).resolve().parent.parent
CATEGORY = "quantization/CalibQuant"
PROMPT_SETS = "calibquant_promptsets"
CALIBRATIONS = "calibquant_calibrations"
CALIBRATION_SUFFIX = ".calibration.safetensors"
VARIED_PROMPTS = PACK / "workflows" / "prompts" / "varied.txt"
CHECKPOINTS = "checkpoints/"  # how an all-in-one checkpoint is told from a diffusion model in a list of both
_MODEL_KEY = "diffusion_model."
_WRAPPER = "calibquant"

PlanType = io.Custom("CALIBQUANT_PLAN")
ProbeType = io.Custom("CALIBQUANT_PROBE")
ReportType = io.Custom("CALIBQUANT_REPORT")
CalibrationType = io.Custom("CALIBQUANT_CALIBRATION")
ConditioningSetType = io.Custom("CALIBQUANT_CONDITIONING_SET")


def register_folders() -> None:
    """Make the demo model, its VAE and its prompts selectable in the stock loaders without copying."""
    folder_paths.add_model_folder_path("diffusion_models", str(PACK / "workflows" / "models"))
    folder_paths.add_model_folder_path("vae", str(PACK / "workflows" / "vae"))
    _register(PROMPT_SETS, "promptsets")
    _register(CALIBRATIONS, "calibrations")


def _register(kind: str, folder: str) -> None:
    """Files of one kind come from models/KIND, from what the nodes saved in output/FOLDER, and from the pack."""
    own = os.path.join(folder_paths.models_dir, kind)
    folder_paths.add_model_folder_path(kind, own, is_default=True)
    folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.get_output_directory(), folder))
    folder_paths.add_model_folder_path(kind, str(PACK / "workflows" / folder))
    folder_paths.folder_names_and_paths[kind][1].add(".safetensors")


def _names(kind: str) -> list[str]:
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:  # a folder was deleted since ComfyUI listed it
        folder_paths.filename_list_cache.pop(kind, None)
        return folder_paths.get_filename_list(kind)


def model_names() -> list[str]:
    """Every file that can be a source: diffusion models, then all-in-one checkpoints as ``checkpoints/NAME``."""
    checkpoints = [CHECKPOINTS + name for name in _names("checkpoints")]
    names = _names("diffusion_models") + checkpoints
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
    """Changes when the file behind the name of a model does."""
    return _stamp(model_path, name)


def calibration_fingerprint(name: str) -> str:
    """Changes when the file behind the name of a calibration does."""
    return _stamp(calibration_path, name)


def _stamp(path_of: Callable[[str], Path], name: str) -> str:
    try:
        stat = path_of(name).stat()
    except (CalibQuantError, OSError):
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def prompt_set_names() -> list[str]:
    return _names(PROMPT_SETS)


def prompt_set_path(name: str) -> Path:
    found = folder_paths.get_full_path(PROMPT_SETS, name)
    if found is None:
        raise CalibQuantError(f"{name}: no such prompt set: choose one from the list")
    return Path(found)


def saved_prompt_set_path(name: str) -> Path:
    """Where the prompt set of that name is saved; its folder is made."""
    return _named("promptsets", name, ".safetensors")


def calibration_names() -> list[str]:
    return _names(CALIBRATIONS)


def calibration_path(name: str) -> Path:
    """The file behind a name of :func:`calibration_names`."""
    found = folder_paths.get_full_path(CALIBRATIONS, name)
    if found is None:
        raise CalibQuantError(f"{name}: no such calibration: choose one from the list (press R to refresh it)")
    return Path(found)


def saved_calibration_path(name: str) -> Path:
    """Where the calibration of that name is kept in ComfyUI's output folder; its folder is made."""
    return _named("calibrations", name, CALIBRATION_SUFFIX)


def new_calibration_path(prefix: str) -> Path:
    """A calibration's file name not yet taken in ComfyUI's output folder; its folder is made."""
    _check_name("filename_prefix", prefix, "calibrations")
    root = folder_paths.get_output_directory()
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(f"calibrations/{prefix}", root)
    os.makedirs(folder, exist_ok=True)
    return Path(folder) / f"{stem}_{counter:05}_{CALIBRATION_SUFFIX}"


def _named(folder: str, name: str, suffix: str) -> Path:
    _check_name("name", name, folder)
    path = Path(folder_paths.get_output_directory(), folder, name.strip().removesuffix(suffix) + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check_name(what: str, name: str, folder: str) -> None:
    parts = name.strip().replace("\\", "/").split("/")
    if not all(parts) or ".." in parts or os.path.isabs(name.strip()) or ":" in name:
        raise CalibQuantError(f"{what} {name!r} is no name inside output/{folder}: use one like calibquant/model")


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


def require_pre_quant_scale() -> None:
    """CalibQuantError when this ComfyUI's loader ignores ``pre_quant_scale``, and would render noise for it."""
    if smoothing.KEY not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        raise CalibQuantError(
            f"this ComfyUI ({comfyui_version.__version__}) ignores {smoothing.KEY}: switch it off, or update ComfyUI"
        )


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


def _source_of(model: Any) -> dict[str, str]:
    loader = getattr(model, "cached_patcher_init", None)  # (function, its arguments …), set by comfy.sd's loaders
    path = next(iter(loader[1]), None) if loader else None
    if not isinstance(path, str):
        return {}
    try:
        with Headers(path) as source:
            return {"source_file": source.path.name, "source_fingerprint": source.fingerprint()}
    except (CalibQuantError, OSError):  # no safetensors file
        return {}


@dataclass(frozen=True)
class SamplingRun:
    """What one sampling run was called with. resolution: the latent's shape; patched: tensors with LoRA patches."""

    seed: int | None
    steps: int
    sampler: str
    cfg: float
    resolution: list[int]
    patched: int


class Observer(Protocol):
    """Told of every sampling run of a MODEL; exactly one of finish and drop follows each start."""

    def start(self, run: SamplingRun) -> Collector: ...

    def finish(self) -> None: ...

    def drop(self) -> None:
        """The run was cancelled or failed."""


def observe(model: Any, observer: Observer) -> Any:
    """A clone of the MODEL whose sampling runs feed the observer's collector; samples stay bit-identical.

    Later clones (LoRA, shift) are observed too. Hooks are on the model's modules only while it samples.
    """
    collectors: list[Collector] = []  # that of the run under way, if one is
    observed = model.clone()
    observed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _WRAPPER, _around_sampling(observer, collectors))
    observed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _WRAPPER, _before_model(collectors))
    return observed


def _around_sampling(observer: Observer, collectors: list[Collector]) -> Callable[..., Any]:
    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if collectors:  # a sampler that samples within its own run: part of that run
            return executor(*args, **kwargs)
        # The module is that of sampling time: conditioning hooks may have swapped in a model of their own.
        patcher = executor.class_obj.model_patcher
        collectors.append(observer.start(_describe_run(executor, args, kwargs)))
        try:
            with _hooks(patcher, collectors[-1]), _force_eager():
                result = executor(*args, **kwargs)
            observer.finish()
        except BaseException:  # a cancel is no Exception
            observer.drop()
            raise
        finally:
            collectors.pop()
        return result

    return sample


def _before_model(collectors: list[Collector]) -> Callable[..., Any]:
    def apply(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        if collectors:
            call = inspect.signature(executor.original).bind(x, t, *args, **kwargs).arguments
            options = call.get("transformer_options") or {}
            collectors[-1].model_call(options.get("sigmas"), options.get("cond_or_uncond"))
        return executor(x, t, *args, **kwargs)

    return apply


def _describe_run(executor: Any, args: Any, kwargs: Any) -> SamplingRun:
    call, guider = inspect.signature(executor.original).bind(*args, **kwargs).arguments, executor.class_obj
    function = getattr(call["sampler"], "sampler_function", call["sampler"])
    sampler = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    shape = list((call.get("latent_shapes") or [call["noise"].shape])[0])
    steps, patched = len(call["sigmas"]) - 1, len(guider.model_patcher.patches)
    return SamplingRun(call.get("seed"), steps, sampler, float(getattr(guider, "cfg", 1)), shape, patched)


@contextlib.contextmanager
def _hooks(patcher: Any, collector: Collector) -> Iterator[None]:
    handles: list[Any] = []
    lock = threading.Lock()  # several GPUs work in threads of their own
    try:
        for each in [patcher, *patcher.get_additional_models_with_key("multigpu")]:
            for name, module in each.model.diffusion_model.named_modules():
                if _is_linear(module):
                    hook = _feed(collector, name.replace("_orig_mod.", ""), lock)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _feed(collector: Collector, layer: str, lock: threading.Lock) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        with lock:
            collector.add(layer, args[0] if args else next(iter(kwargs.values())), output)

    return hook


def _is_linear(module: Any) -> bool:
    """Mixed-precision Linears of comfy.ops are no nn.Linear."""
    own = hasattr(module, "in_features") and hasattr(module, "forward_comfy_cast_weights")
    return isinstance(module, torch.nn.Linear) or own


def _force_eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled code skips hooks that came after its first trace."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class SamplerSettings:
    steps: int
    cfg: float
    sampler: str
    scheduler: str


def empty_latent(model: Any, width: int, height: int, frames: int) -> torch.Tensor:
    """Zeros of the shape this MODEL samples: [1, C, H, W], or [1, C, T, H, W] for a video model. Sizes in pixels."""
    latent = model.get_model_object("latent_format")
    size = [max(1, n // latent.spacial_downscale_ratio) for n in (height, width)]
    if latent.latent_dimensions == 3:
        size.insert(0, (frames - 1) // latent.temporal_downscale_ratio + 1)
    elif latent.latent_dimensions != 2:
        raise CalibQuantError("this MODEL makes neither images nor video: use Monitor Calibration in its own graph")
    return comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, latent.latent_channels, *size))


def draw(
    model: Any, positive: Any, negative: Any, latent: torch.Tensor, settings: SamplerSettings, seed: int, step: Any
) -> torch.Tensor:
    """One sample as the stock KSampler draws it. step(done, of, preview) after every step; preview as ComfyUI's."""
    previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def callback(index: int, x0: torch.Tensor, _x: torch.Tensor, total: int) -> None:
        step(index + 1, total, previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None)

    noise = comfy.sample.prepare_noise(latent, seed)
    how = (settings.steps, settings.cfg, settings.sampler, settings.scheduler)
    return comfy.sample.sample(
        model, noise, *how, positive, negative, latent, callback=callback, disable_pbar=True, seed=seed
    )


def preview_progress(total: int) -> Callable[[int, Any], None]:
    """ComfyUI's progress bar with pictures: update(done, preview); a cancel raises."""
    bar = comfy.utils.ProgressBar(total)

    def update(done: int, preview: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, preview)

    return update
