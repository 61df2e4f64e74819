"""A MODEL whose layers are replaced while it samples, and only then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...quant_core.errors import CalibQuantError
from ...quant_core.evidence.watch import force_eager, linears, replaced

_WRAPPER = "calibquant_layers"
Layer = Callable[[torch.Tensor], torch.Tensor]


def with_layers(model: Any, layers: Mapping[str, Layer]) -> Any:
    """A clone of the MODEL that samples with these in the place of its Linears; named by their place in the model.

    CalibQuantError for a layer that the MODEL does not have. It must have no injections, whose place they would take.
    """
    if unknown := sorted(layers.keys() - dict(linears(model.model.diffusion_model)).keys()):
        raise CalibQuantError(f"the linked MODEL has no layer {unknown[0]}: load it from the file that the plan is for")

    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        # The module is that of sampling time: conditioning hooks may have swapped in a model of their own.
        patcher = executor.class_obj.model_patcher
        with contextlib.ExitStack() as stack:
            for each in (patcher, *patcher.get_additional_models_with_key("multigpu")):
                for name, module in linears(each.model.diffusion_model):
                    if name in layers:
                        stack.enter_context(replaced(module, layers[name]))
            stack.enter_context(force_eager())
            return executor(*args, **kwargs)

    emulated = model.clone()
    emulated.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _WRAPPER, sample)
    return emulated
