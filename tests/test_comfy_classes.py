"""Every model class of ComfyUI: what this tool would quantize loads as a Linear, and is detected as before.

The facts are ComfyUI's own: its classes built on the meta device, its detection, its renaming of keys. Runs on the
ComfyUI that the tests find; cases of classes that this version lacks are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_classes import CASES, Built, Case, Shapes

from quant_core.formats import FORMATS
from quant_core.models.architectures import LayerInfo, detect
from quant_core.planning.layout import encode_config
from quant_core.planning.recipes import legal
from quant_core.rounding.layerplan import LayerPlan

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def built(comfy: Path) -> Iterator[dict[str, Built]]:
    """The models built so far, by case: each is built once and serves every test of its case."""
    yield {}


@pytest.fixture
def model(request: pytest.FixtureRequest, built: dict[str, Built]) -> Built:
    import comfy.supported_models

    case = CASES[request.param]
    if not any(known.__name__ == case.name for known in comfy.supported_models.models):
        pytest.skip(f"this ComfyUI has no {case.name}")
    if request.param not in built:
        built[request.param] = Built.of(case)
    return built[request.param]


every_case = pytest.mark.parametrize("model", list(CASES), indirect=True)


def meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def layers_of(shapes: Shapes) -> dict[str, LayerInfo]:
    """What this tool knows of the layers of a file with these keys, as ModelFile finds them."""
    names = [key.removesuffix(".weight") for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2]
    return detect(shapes, shapes).describe_file(names, shapes)


def quantized(shapes: Shapes, infos: dict[str, LayerInfo], fmt: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of the file in which everything that may be ``fmt`` is, and the names of those layers.

    ``explicit``: the layers that stay by default count too, because a rule of the user may name them.
    """
    layout = FORMATS[fmt].layout
    tensors, layers = meta(shapes), []
    for name, info in infos.items():
        entry = legal(LayerPlan(fmt, ""), info, shapes[name + ".weight"], explicit=True)
        if entry.format != fmt:
            continue
        layers.append(name)
        for suffix, (dtype, shape) in layout(shapes[name + ".weight"]).items():
            tensors[f"{name}.{suffix}"] = torch.empty(shape, dtype=dtype, device="meta")
        if config := FORMATS[fmt].config(shapes[name + ".weight"]):
            tensors[f"{name}.input_scale"] = torch.empty((), device="meta")
            tensors[f"{name}.comfy_quant"] = encode_config(config)
    return tensors, layers


def detected(tensors: dict[str, torch.Tensor], case: Case) -> tuple[str, Any]:
    """The class that ComfyUI makes of a file with these tensors, and its configuration."""
    import comfy.model_detection

    metadata = {"config": json.dumps({"transformer": dict(case.metadata)})} if case.metadata else None
    config = comfy.model_detection.model_config_from_unet(tensors, "", metadata=metadata)
    return type(config).__name__, config and config.unet_config


def test_there_is_a_case_for_every_class_of_comfyui(comfy: Path) -> None:
    import comfy.supported_models

    assert {known.__name__ for known in comfy.supported_models.models} <= {case.name for case in CASES.values()}


@every_case
def test_a_case_is_what_comfyui_detects_and_builds_from_such_a_file(model: Built) -> None:
    name, config = detected(meta(model.file_shapes), model.case)
    assert name == model.case.name
    assert Built.of(Case(name, config, extra=model.case.extra, device=model.case.device)).shapes == model.shapes


@every_case
def test_only_what_the_loader_runs_as_a_linear_can_be_quantized(model: Built) -> None:
    infos = layers_of(model.file_shapes)
    told = {name for name, info in infos.items() if info.not_linear}
    true = {name for name in infos if name not in model.linears}
    assert told == true
    assert all(infos[name].protected for name in told)
    with_prefix = layers_of({PREFIX + key: shape for key, shape in model.file_shapes.items()})
    assert {name for name, info in with_prefix.items() if info.not_linear} == {PREFIX + name for name in true}


@every_case
def test_quantizing_changes_nothing_that_comfyui_detects_and_loses_no_scale(model: Built) -> None:
    before = detected(meta(model.file_shapes), model.case)
    infos = layers_of(model.file_shapes)
    for fmt in FORMATS:
        tensors, layers = quantized(model.file_shapes, infos, fmt)
        assert layers, fmt
        assert detected(dict(tensors), model.case) == before, fmt
        loaded = model.config.process_unet_state_dict(dict(tensors))
        for name in layers:
            for suffix in FORMATS[fmt].layout(model.file_shapes[name + ".weight"]):
                assert loaded[f"{model.linears[name]}.{suffix}"] is tensors[f"{name}.{suffix}"], fmt
