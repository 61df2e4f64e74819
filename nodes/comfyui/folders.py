"""ComfyUI's folders: which models, calibrations and prompt sets there are, and where results go."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths

from ...quant_core.errors import CalibQuantError
from ...quant_core.files.disk import abandoned
from ...quant_core.files.markers import FP8
from ...quant_core.models import splitfile
from ...quant_core.models.modelfile import ModelFile

PACK = Path(__file__).resolve().parents[2]
PROMPT_SETS = "calibquant_promptsets"
CALIBRATIONS = "calibquant_calibrations"
GGUF = "calibquant_gguf"  # the same folders as diffusion_models, whose own list leaves .gguf files out
CALIBRATION_SUFFIX = ".calibration.safetensors"
MISSING = "missing"  # the stamp of a file that is not there
VARIED_PROMPTS = PACK / "workflows" / "prompts" / "varied.txt"
HELD_OUT_PROMPTS = PACK / "workflows" / "prompts" / "held_out.txt"
MAX_NAME = 200  # bytes of each part of a path; file systems take 255, numbers and suffixes need some
# Told from diffusion models in one list by the name of their folder, which comes first: checkpoints/NAME.
OTHERS = ("checkpoints", "text_encoders")
LOADERS = {"checkpoints": "Load Checkpoint", "text_encoders": "Load CLIP", "diffusion_models": "Load Diffusion Model"}
SAVED_IN = {"text_encoders": "clip"}  # below output: ComfyUI lists that folder under its old name


PARTS = ("model", "model,te", "model,vae", "model,te,vae", "te", "vae", "te,vae")  # of such a checkpoint


def register_folders() -> None:
    """Make the demo model, its VAE, LoRA and prompts selectable in the stock loaders without copying."""
    folder_paths.add_model_folder_path("diffusion_models", str(PACK / "workflows" / "models"))
    folder_paths.add_model_folder_path("vae", str(PACK / "workflows" / "vae"))
    folder_paths.add_model_folder_path("loras", str(PACK / "workflows" / "loras"))
    folder_paths.folder_names_and_paths[GGUF] = (folder_paths.folder_names_and_paths["diffusion_models"][0], {".gguf"})
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
    """Every file that can be a source: diffusion models, ``checkpoints/NAME``, ``text_encoders/NAME``, GGUF files."""
    others = [f"{folder}/{name}" for folder in OTHERS for name in _names(folder)]
    return [name for name in _names("diffusion_models") + others if name.endswith(".safetensors")] + _names(GGUF)


def encoder_names() -> list[str]:
    """Of model_names() the text encoders."""
    return [name for name in model_names() if _kind(name) == "text_encoders"]


def first_original() -> str | None:
    """Of model_names() the first 16-bit model, as its header tells; None where there is none."""
    names = ((name, _find_model(name)) for name in model_names())
    return next((name for name, path in names if path and _is_original(path, stamp(path))), None)


@functools.lru_cache(maxsize=1024)
def _is_original(path: Path, _stamp: str) -> bool:
    """Whether a file can be quantized and is no FP8 or GGUF; the stamp changes when the file does."""
    try:
        with ModelFile(path) as model:
            stored = (model.checkpoint.entries[f"{layer}.weight"] for layer in model.layers)
            return not any(entry.dtype in FP8 or entry.blocks for entry in stored)
    except (CalibQuantError, OSError):
        return False


def name_of(path: Path) -> str:
    """The name in model_names() of a file, or its own name if it lies elsewhere."""
    names = ((name, _find_model(name)) for name in model_names())
    return next((name for name, found in names if found and found.exists() and found.samefile(path)), path.name)


def split_names() -> list[str]:
    """Of model_names() those that say by their name that they are split."""
    return [name for name in model_names() if name.endswith(splitfile.MAIN)]


def split_lora_paths(lora: str, main: Path) -> list[Path]:
    """Every file that may be a split's LoRA: of that name in the loras folders, then beside its main file."""
    names = [name for name in _names("loras") if Path(name).name == lora]
    found = [folder_paths.get_full_path("loras", name) for name in names]
    beside = main.with_name(lora)
    return [*(Path(path) for path in found if path), *([beside] if beside.is_file() else [])]


def new_lora_path(prefix: str) -> tuple[Path, str]:
    """A LoRA's file name not yet taken in ComfyUI's output folder, and the name under which a stock loader finds it."""
    return _numbered("loras", prefix, ".safetensors")


def model_path(name: str) -> Path:
    """The file behind a name of :func:`model_names`."""
    found = _find_model(name)
    if found is None:
        raise CalibQuantError(f"there is no model {name}: choose one from the list (press R to refresh it)")
    return found


def _find_model(name: str) -> Path | None:
    found = folder_paths.get_full_path("diffusion_models", name)
    folder, _, below = name.partition("/")
    if found is None and folder in OTHERS:
        found = folder_paths.get_full_path(folder, below)
    return Path(found) if found else None


def fingerprint(name: str | None) -> str:
    """Changes when the file behind the name of a model does; None: a linked name, which is known when the node runs."""
    return _stamp_of(model_path, name) if name is not None else "linked"


def calibration_fingerprint(name: str) -> str:
    """Changes when the file behind the name of a calibration does."""
    return _stamp_of(calibration_path, name)


def prompt_file_fingerprint(name: str) -> str:
    """Changes when a text file in the input folder does."""
    return _stamp_of(prompt_file, name)


def _stamp_of(path_of: Callable[[str], Path], name: str) -> str:
    try:
        return stamp(path_of(name))
    except CalibQuantError:
        return MISSING


def stamp(path: Path) -> str:
    """Changes when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _find(kind: str, what: str, name: str) -> Path:
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        raise CalibQuantError(f"there is no {what} {name}: choose one from the list (press R to refresh it)")
    return Path(found)


def prompt_set_names() -> list[str]:
    return _names(PROMPT_SETS)


def prompt_set_path(name: str) -> Path:
    return _find(PROMPT_SETS, "prompt set", name)


def saved_prompt_set_path(name: str) -> Path:
    """Where the prompt set of that name is saved; its folder is made."""
    return _named("promptsets", name, ".safetensors")


def calibration_names() -> list[str]:
    return _names(CALIBRATIONS)


def calibration_path(name: str) -> Path:
    """The file behind a name of :func:`calibration_names`."""
    return _find(CALIBRATIONS, "calibration", name)


def saved_calibration_path(name: str) -> Path:
    """Where the calibration of that name is kept in ComfyUI's output folder; its folder is made."""
    return _named("calibrations", name, CALIBRATION_SUFFIX)


def new_calibration_path(prefix: str) -> Path:
    """A calibration's file name not yet taken in ComfyUI's output folder; its folder is made."""
    return _numbered("calibrations", prefix, CALIBRATION_SUFFIX)[0]


def unfinished_calibration_path(name: str, job: str) -> Path:
    """Where what is done of a job, known by its digest, is kept until it is finished; its folder is made."""
    return saved_calibration_path(f"unfinished/{name}_{job[:12]}")


def new_comparison_path(prefix: str) -> Path:
    """A name without suffix below output/comparisons that no file has yet; its folder is made."""
    return _numbered("comparisons", prefix, "")[0]


def prompt_files() -> list[str]:
    """Text files in ComfyUI's input folder."""
    return sorted(path.name for path in Path(folder_paths.get_input_directory()).glob("*.txt") if path.is_file())


def prompt_file(name: str) -> Path:
    if name not in prompt_files():
        raise CalibQuantError(f"there is no file {name} in ComfyUI's input folder: choose one from the list (press R)")
    return Path(folder_paths.get_input_directory(), name)


def _named(folder: str, name: str, suffix: str) -> Path:
    _check_name("name", name, folder)
    path = Path(folder_paths.get_output_directory(), folder, name.strip().removesuffix(suffix) + suffix)
    with _explained("name", name, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _numbered(folder: str, prefix: str, suffix: str) -> tuple[Path, str]:
    """A file not yet taken below a folder of ComfyUI's output folder, which is made; and its name below that folder."""
    return _numbered_alike(prefix, {folder: suffix})[0]


def _numbered_alike(prefix: str, suffixes: dict[str, str]) -> list[tuple[Path, str]]:
    """The same for several files, each below a folder of its own, under one number that none of them has taken.

    What a killed run left takes no number: the next run for that name goes on with it, or removes it.
    """
    places = []
    for folder in suffixes:
        _check_name("filename_prefix", prefix, folder)
        with _explained("filename_prefix", prefix, folder):
            root = folder_paths.get_output_directory()
            places.append(folder_paths.get_save_image_path(f"{folder}/{prefix.strip()}", root))
            os.makedirs(places[-1][0], exist_ok=True)

    def names(number: int) -> list[tuple[Path, str]]:
        found = []
        for (folder, suffix), (path, stem, _, below, _) in zip(suffixes.items(), places, strict=True):
            name = f"{stem}_{number:05}_{suffix}"
            found.append((Path(path) / name, str(Path(below).relative_to(folder) / name)))
        return found

    number = max(counter for _, _, counter, _, _ in places)
    before = [path for path, _ in names(number - 1)]
    left = [abandoned(path) for path in before]
    only_left = any(left) and None not in left and not any(path.exists() for path in before)
    return names(number - 1 if only_left else number)


@contextlib.contextmanager
def _explained(what: str, name: str, folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise CalibQuantError(f"{what} {name!r} cannot be used in output/{folder}: {e.strerror}: use another") from e


def _check_name(what: str, name: str, folder: str) -> None:
    """CalibQuantError for a name that leaves the folder or that some system cannot have as a file's name."""
    parts = name.strip().replace("\\", "/").split("/")
    odd = any(c in '<>:"|?*' or c < " " or "\ud800" <= c <= "\udfff" for c in name)
    if odd or not all(part.strip(". ") and len(part.encode()) <= MAX_NAME for part in parts):
        raise CalibQuantError(f"{what} {name!r} is no name inside output/{folder}: use one like calibquant/model")


def kinds(parts: str) -> tuple[str, ...]:
    """A choice of PARTS for the engine: the model alone is what every file has, whatever it is."""
    return () if parts == PARTS[0] else tuple(parts.split(","))


def output_path(prefix: str, model_name: str) -> tuple[Path, str]:
    """A file name not yet taken in ComfyUI's output folder, and the name under which a stock loader finds it."""
    return _numbered(_place(model_name), prefix, ".safetensors")


def output_root(model_name: str) -> Path:
    """The folder below which everything made of that model is saved."""
    return Path(folder_paths.get_output_directory(), _place(model_name))


def split_paths(prefix: str, model_name: str) -> list[tuple[Path, str]]:
    """The same for the two files of a split: the main file, and its LoRA below output/loras."""
    return _numbered_alike(prefix, {_place(model_name): splitfile.MAIN, "loras": splitfile.BRANCH})


def _kind(model_name: str) -> str:
    folder = model_name.partition("/")[0]
    return folder if folder in OTHERS else "diffusion_models"


def loader_of(model_name: str) -> str:
    """The stock node that loads what is made of that model."""
    return LOADERS[_kind(model_name)]


def _place(model_name: str) -> str:
    """The folder of ComfyUI's output folder in which what is made of that model is listed by the stock loaders."""
    return SAVED_IN.get(_kind(model_name), _kind(model_name))


def shown(path: Path) -> str:
    """A file below ComfyUI's output folder, as the user finds it."""
    return (Path("output") / path.relative_to(folder_paths.get_output_directory())).as_posix()


def output_image(path: Path) -> dict[str, str]:
    """A picture below ComfyUI's output folder, as the page asks the server for it."""
    below = path.parent.relative_to(folder_paths.get_output_directory()).as_posix()
    return {"filename": path.name, "subfolder": below, "type": "output"}
