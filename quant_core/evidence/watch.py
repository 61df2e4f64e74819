"""Feed a collector from a model's Linears while it runs. Any torch model: nothing here knows ComfyUI::

collector = Collector(lambda layer: "")
collector.start_run("first prompt")
with watch(model, collector):
    model(x)
collector.finish_run()
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

_COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's parts


class Listener(Protocol):
    """A Collector, or what stands before one."""

    def add(self, layer: str, x: torch.Tensor, y: torch.Tensor) -> None: ...


@contextlib.contextmanager
def watch(
    model: torch.nn.Module,
    collector: Listener,
    *replicas: torch.nn.Module,
    names: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """While the block runs, every call of a Linear of ``model`` is told to the collector; outputs do not change.

    replicas: copies of the model on other devices, whose Linears have the same names. Layers are named by their place
    in the model; ``names`` renames them, and those that are not in it are not watched. Compiled code runs uncompiled
    meanwhile: it skips hooks that came after its first trace.
    """
    handles: list[Any] = []
    lock = threading.Lock()  # several GPUs work in threads of their own
    try:
        for each in (model, *replicas):
            for name, module in linears(each):
                if layer := name if names is None else names.get(name):
                    handles.append(module.register_forward_hook(_feed(collector, layer, lock), with_kwargs=True))
        with force_eager():
            yield
    finally:
        for handle in handles:
            handle.remove()


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model's Linears, named by their place in it, compiled or not."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name.replace(_COMPILED, ""), module


def is_linear(module: torch.nn.Module) -> bool:
    """Whether it multiplies by a 2-D weight; ComfyUI's mixed-precision Linears are no nn.Linear."""
    own = hasattr(module, "in_features") and hasattr(module, "forward_comfy_cast_weights")
    return isinstance(module, torch.nn.Linear) or own


def _feed(collector: Listener, layer: str, lock: threading.Lock) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        with lock:
            collector.add(layer, args[0] if args else next(iter(kwargs.values())), output)

    return hook


def force_eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled code runs uncompiled while the block does."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A forward of the module's own for a while, and then what it had."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
