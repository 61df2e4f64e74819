"""Low-rank branches beside the layers of a MODEL, added to their outputs while it runs; no weight is touched.

ComfyUI's own bypass (comfy/weight_adapter/bypass.py, 0.29 and 0.33) replaces a module's ``forward``. Two of its
injections on one module are taken off in the order in which they were put on, which leaves the first one's forward in
place without what it calls. So ours is a forward hook of torch: it comes and goes without regard to theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.sd
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import PatcherInjection

from ...quant_core.errors import CalibQuantError

KEY = "calibquant_split"  # not "bypass_lora", under which the stock loaders keep theirs and replace each other's
Branches = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer of the MODEL -> up, down


def load_model(path: Path) -> Any:
    """As Load Diffusion Model does; of an all-in-one checkpoint the diffusion model."""
    return comfy.sd.load_diffusion_model(str(path))


def with_branch(model: Any, lora: Path, whose: Path) -> Any:
    """A clone of the MODEL with a LoRA file's factors beside its layers, under an injection key of their own.

    Raises CalibQuantError unless every tensor of the LoRA finds its layer.
    """
    tensors = comfy.utils.load_torch_file(str(lora), safe_load=True)
    found = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    used = {key for adapter in found.values() for key in getattr(adapter, "loaded_keys", ())}
    if lost := sorted(tensors.keys() - used):
        raise CalibQuantError(
            f"{whose}: this ComfyUI finds no layer for {lost[0]} of its LoRA {lora.name}: update ComfyUI, or quantize "
            "without a split"
        )
    branches = {key.removesuffix(".weight"): adapter.weights[:2] for key, adapter in found.items()}
    branched = model.clone()
    injected = _Injected(branches)
    branched.set_injections(KEY, [PatcherInjection(inject=injected.inject, eject=injected.eject)])
    return branched


class _Injected:
    """The hooks on the modules of loaded MODELs. Clones share modules: the hooks stay while one of them is loaded."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._loaded: dict[int, int] = {}  # id of a loaded patcher -> id of its model
        self._hooks: dict[int, list[Any]] = {}  # id of a model -> what takes its hooks off

    def inject(self, patcher: Any) -> None:
        model = id(patcher.model)
        if model not in self._hooks:
            self._hooks[model] = [
                comfy.utils.get_attr(patcher.model, layer).register_forward_hook(
                    _Branch(*(factor.to(patcher.load_device) for factor in factors))
                )
                for layer, factors in self._branches.items()
            ]
        self._loaded[id(patcher)] = model

    def eject(self, patcher: Any) -> None:
        model = self._loaded.pop(id(patcher), None)
        if model is not None and model not in self._loaded.values():
            for hook in self._hooks.pop(model):
                hook.remove()


class _Branch:
    """A forward hook that adds (x @ down^T) @ up^T, in the dtype of x, to a layer's output."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        self._up, self._down = up, down

    def __call__(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        x = inputs[0]
        inside = F.linear(x, self._down.to(x.device, x.dtype))
        return output + F.linear(inside, self._up.to(x.device, x.dtype))
