"""A CLIP: which of its modules runs a file, what that one's layers see, and what the CLIP makes of a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfyui_version
import torch

from ...quant_core.errors import CalibQuantError
from ...quant_core.evidence.collector import Collector
from ...quant_core.evidence.watch import linears, watch
from ...quant_core.files.header import Headers
from ...quant_core.models.modelfile import ModelFile
from . import patches

# What ComfyUI renames when it loads some files (comfy.sd.load_text_encoder_state_dicts).
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."), ("lm_head", "model.lm_head"))


@dataclass(frozen=True)
class Encoder:
    """What runs one file in a CLIP, which may hold several. layers: a Linear's name in ``module`` -> the file's, bare.

    zeroes_padding: what it makes of padding is thrown away, and no other token looks at it.
    """

    module: torch.nn.Module
    layers: dict[str, str]
    zeroes_padding: bool


def files_of(clip: Any) -> list[Path]:
    """The files that the CLIP was loaded from; none where its loader left no trace of them."""
    return patches.paths_of(clip.patcher)


def the_file_of(clip: Any) -> Path:
    """The only file of the CLIP; CalibQuantError where there are several, or none is known."""
    files = files_of(clip)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise CalibQuantError(f"the CLIP was loaded from several files ({names}): choose one of them as model_name")
    if not files:
        raise CalibQuantError("the CLIP does not say which file it was loaded from: choose it as model_name")
    return files[0]


def find_encoder(clip: Any, file: ModelFile) -> Encoder:
    """What runs this file in the CLIP. CalibQuantError: the CLIP was loaded from others, or none has its layers."""
    _check_origin(clip, file)
    here = dict(linears(clip.cond_stage_model))
    shapes = {name: (module.out_features, module.in_features) for name, module in here.items()}
    places: dict[str, dict[str, str]] = {}  # prefix of a module -> its Linears that the file has
    for layer in file.layers:
        bare = layer.removeprefix(file.prefix)
        for spelling in _spellings(bare):
            for name in (name for name in here if name == spelling or name.endswith(f".{spelling}")):
                if shapes[name] == file.shape(layer):
                    places.setdefault(name.removesuffix(spelling), {})[spelling] = bare
    prefix = max(places, key=lambda place: len(places[place]), default=None)
    if prefix is None:
        raise CalibQuantError(
            f"{file.path}: no encoder of the linked CLIP has its layers: load the CLIP from this file"
        )
    for name in here:
        below = name.removeprefix(prefix)
        if name.startswith(prefix) and _numbered(below) and below not in places[prefix]:
            raise CalibQuantError(
                f"{file.path}: layer {below} of the linked CLIP is not in this file: load the CLIP from this file"
            )
    around = clip.cond_stage_model.get_submodule(prefix.rstrip(".").rpartition(".")[0])
    zeroes = getattr(around, "zero_out_masked", False) and getattr(around, "enable_attention_masks", False)
    return Encoder(clip.cond_stage_model.get_submodule(prefix.rstrip(".")), places[prefix], bool(zeroes))


def identity(file: ModelFile) -> dict[str, Any]:
    """Of an encoder's file, for a calibration's header."""
    return {
        "architecture": file.architecture.name,
        "comfyui": comfyui_version.__version__,
        "source_file": file.path.name,
        "source_fingerprint": file.checkpoint.fingerprint(),
    }


@contextlib.contextmanager
def watching(encoder: Encoder, collector: Collector) -> Iterator[None]:
    """While the block encodes, the encoder's Linears feed the collector; what is encoded stays bit-identical.

    Padding counts like any token, unless it is thrown away: UMT5 fills up to 512 tokens, most of which nobody reads.
    """
    with contextlib.ExitStack() as hooks:
        listener: Collector | _Read = collector
        if encoder.zeroes_padding:
            listener = _Read(collector)
            hook = encoder.module.register_forward_pre_hook(listener.begin, with_kwargs=True)
            hooks.callback(hook.remove)
        hooks.enter_context(watch(encoder.module, listener, names=encoder.layers))
        yield


class _Read:
    """Stands before a collector and lets tokens pass that the attention mask does not hide."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._mask: torch.Tensor | None = None

    def begin(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self._mask = None if mask is None else mask.bool()  # [batch, tokens]

    def add(self, layer: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            x, y = x[self._mask], y[self._mask]
        self._collector.add(layer, x, y)


def encode(clip: Any, text: str) -> dict[str, Any]:
    """A prompt as the CLIP encodes it: ``cond`` and ``options`` (pooled_output and alike), on the CPU."""
    scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(scheduled) != 1:
        raise CalibQuantError(f"prompt {text!r}: this CLIP changes with the step: unlink its hooks, then encode again")
    return on_cpu(scheduled[0])


def on_cpu(conditioning: Any) -> dict[str, Any]:
    """One entry of a CONDITIONING, as a prompt set keeps it."""
    cond, options = conditioning
    return {"cond": cond.cpu(), "options": {k: _to_cpu(v) for k, v in options.items() if v is not None}}


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _check_origin(clip: Any, file: ModelFile) -> None:
    files = files_of(clip)
    fingerprint = file.checkpoint.fingerprint()
    if files and not any(_fingerprint(path) == fingerprint for path in files):
        names = ", ".join(path.name for path in files)
        raise CalibQuantError(
            f"{file.path}: the linked CLIP was loaded from another file ({names}): choose the same file in both nodes"
        )


def _fingerprint(path: Path) -> str:
    try:
        with Headers(path) as file:
            return file.fingerprint()
    except (CalibQuantError, OSError):  # no safetensors file, or gone
        return ""


def _spellings(layer: str) -> list[str]:
    """How a layer of a file may be called in ComfyUI's modules."""
    return [layer, *(new + layer.removeprefix(old) for old, new in RENAMED if layer.startswith(old))]


def _numbered(layer: str) -> bool:
    return any(part.isdigit() for part in layer.split("."))
