"""A sampling MODEL's prediction as something to differentiate: ComfyUI runs its nodes in inference mode."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ...quant_core.evidence.probing import Predict, cloned
from ...quant_core.evidence.watch import is_linear

_WRAPPER = "calibquant_points"
FREE_SHARE = 0.8  # of the free memory, that a backward pass may hold


def check_cancel() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory(model: Any) -> float:
    """Bytes that a backward pass may hold on the MODEL's device."""
    return FREE_SHARE * comfy.model_management.get_free_memory(model.load_device)


def stopping(model: Any, points: int, visit: Callable[[Predict, int], None]) -> Any:
    """A clone of the MODEL that calls visit(predict, number) for each of ``points`` points of every sampling run.

    Points are even in the share of the path that a step makes, so that a long step has several: its error weighs more
    in the picture. Grad mode is on meanwhile; samples stay as they are.
    """
    due: dict[int, list[int]] = {}  # step -> its points
    sigmas: list[float] = []  # of the run under way
    stopping = model.clone()

    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if sigmas:  # a sampler that samples within its own run
            return executor(*args, **kwargs)
        call = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        sigmas.extend(call["sigmas"].tolist())
        for number, step in enumerate(steps_of_points(sigmas, points)):
            due.setdefault(step, []).append(number)
        try:
            return executor(*args, **kwargs)
        finally:
            sigmas.clear()
            due.clear()

    def apply(executor: Any, *args: Any, **kwargs: Any) -> Any:
        predicted = executor(*args, **kwargs)
        call = inspect.signature(executor.original).bind(*args, **kwargs)
        call.apply_defaults()
        now = call.arguments["transformer_options"].get("sigmas")
        numbers = due.pop(_step(sigmas, float(now.max())), []) if now is not None and sigmas else []
        if numbers:
            with _differentiable(executor.class_obj.diffusion_model):
                for number in numbers:
                    visit(lambda: _predict(executor, call), number)
        return predicted

    stopping.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _WRAPPER, sample)
    stopping.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _WRAPPER, apply)
    return stopping


def steps_of_points(sigmas: list[float], points: int) -> list[int]:
    """The step that each point is in. The way is measured in sigma, or in sigma / (1 + sigma) if that exceeds 1."""
    way = [s if max(sigmas) <= 1 else s / (1 + s) for s in sigmas]
    first, last = way[0], way[-1]
    return [_step(way, last + (first - last) * (1 - (i + 0.5) / points)) for i in range(points)]


def _step(ends: list[float], value: float) -> int:
    """The last step that begins at or above the value."""
    begun = sum(end >= value * (1 - 1e-5) for end in ends[:-1])
    return max(0, begun - 1)


def _predict(executor: Any, call: inspect.BoundArguments) -> torch.Tensor:
    """The model's own output at the inputs of this call: one tensor [B, …]."""
    bound = executor.original, [cloned(value) for value in call.args], cloned(call.kwargs)
    copied = inspect.signature(bound[0]).bind(*bound[1], **bound[2])
    copied.arguments["transformer_options"]["optimized_attention_override"] = _plain_attention
    found: list[Any] = []
    hook = executor.class_obj.diffusion_model.register_forward_hook(lambda _module, _args, output: found.append(output))
    try:
        executor(*copied.args, **copied.kwargs)
    finally:
        hook.remove()
    output = found[0]
    return output if isinstance(output, torch.Tensor) else torch.cat([each.flatten(1) for each in output], 1)


def _plain_attention(_function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's: SageAttention has no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def _differentiable(diffusion_model: torch.nn.Module) -> Iterator[None]:
    """Grad mode, ComfyUI's differentiable kernels, and a model without tensors of inference mode.

    Linears are spared: the probes ask for their weights and keep none.
    """
    training, replaced = comfy.model_management.in_training, []
    with torch.inference_mode(False), torch.enable_grad():
        try:
            comfy.model_management.in_training = True
            for module in diffusion_model.modules():
                for tensors in () if is_linear(module) else (module._parameters, module._buffers):
                    for name, tensor in list(tensors.items()):
                        if tensor is not None and tensor.is_inference():
                            replaced.append((tensors, name, tensor))
                            copy = tensor.detach().clone()
                            parameter = isinstance(tensor, torch.nn.Parameter)
                            tensors[name] = torch.nn.Parameter(copy, requires_grad=False) if parameter else copy
            yield
        finally:
            comfy.model_management.in_training = training
            for tensors, name, tensor in replaced:
                tensors[name] = tensor


@contextlib.contextmanager
def weight(module: torch.nn.Module, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight of a Linear as it multiplies, LoRAs included, in the dtype and on the device of ``like``."""
    if not isinstance(module, comfy.ops.CastWeightBiasOp):
        yield module.weight.detach().to(like)
        return
    cast, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        yield cast
    finally:
        comfy.ops.uncast_bias_weight(module, cast, bias, stream)
