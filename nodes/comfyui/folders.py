"""ComfyUI's folders: which models, calibrations and prompt sets there are, and where results go."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...quant_core.errors import CalibQuantError

PACK = Path(__file__).resolve().parents[2]
PROMPT_SETS = "calibquant_promptsets"
CALIBRATIONS = "calibquant_calibrations"
CALIBRATION_SUFFIX = ".calibration.safetensors"
VARIED_PROMPTS = PACK / "workflows" / "prompts" / "varied.txt"
CHECKPOINTS = "checkpoints/"  # how an all-in-one checkpoint is told from a diffusion model in a list of both


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
