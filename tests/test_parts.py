"""Whole checkpoints: each part is quantized in what ComfyUI's checkpoint loader reads of it, and loads there."""

from __future__ import annotations

import asyncio
import functools
import importlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import models
import pytest
import torch
from safetensors.torch import load_file

from quant_core import jobs
from quant_core.cli.main import main
from quant_core.errors import CalibQuantError
from quant_core.formats import FORMATS, SOURCE
from quant_core.jobs.finished import QuantizedFile
from quant_core.models.architectures import ARCHITECTURES, detect
from quant_core.models.source import Source
from quant_core.planning import plan as plans
from quant_core.planning import recipes
from quant_core.planning.plan import Plan
from quant_core.reports import describe

T5, CLIP = "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer."
MADE = {"flux": checkpoints.flux, "klein": checkpoints.klein, "sd15": checkpoints.sd15}
PROMPT = "a red cat on a mat"


@pytest.fixture(scope="module")
def made(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small checkpoint by name."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        return path if path.exists() else models.save(path, MADE[name]())

    return make


@pytest.fixture(autouse=True)
def _unload() -> Iterator[None]:
    yield
    if "comfy.model_management" in importlib.sys.modules:
        importlib.import_module("comfy.model_management").unload_all_models()


def quantized(source: Path, recipe: str, output: Path, kinds: str) -> Plan:
    with Source(source, kinds=kinds.split(",")) as file:
        plan = recipes.make_plan(file, recipe)
        jobs.quantize(file, plan, output, rounding="nearest", verify=True)
    assert output.stat().st_size == plan.size
    return plan


def loaded(path: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, by Load Checkpoint's own function."""
    sd = importlib.import_module("comfy.sd")
    with torch.inference_mode():
        return sd.load_checkpoint_guess_config(str(path), te_model_options=checkpoints.OPTIONS)[:3]


def conditioning(clip: Any) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[0].float()


def decode(vae: Any) -> torch.Tensor:
    latent = torch.randn(1, vae.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return vae.decode(latent)


def layouts(clip: Any, encoder: str) -> dict[str, str]:
    """Layer of an encoder -> the layout in which its weight arrived."""
    modules = getattr(clip.cond_stage_model, encoder).transformer.named_modules()
    found = {name: getattr(getattr(module, "weight", None), "_layout_cls", "") for name, module in modules}
    return {name: layout for name, layout in found.items() if layout}


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y - reference).square().sum() / reference.square().sum()).item()


def in_float32(source: Path, quantized: Path, output: Path) -> Path:
    """The checkpoint with what the quantized file's layers stand for, in float32."""
    tensors = {key: tensor.float() for key, tensor in load_file(source).items()}
    with QuantizedFile(quantized) as file:
        for key, tensor in tensors.items():
            layer = key.removesuffix(".weight")
            if key != layer and tensor.dim() == 2 and file.format(layer) != SOURCE:
                tensors[key] = torch.cat(list(file.rows(layer, tuple(tensor.shape))))
    return models.save(output, tensors)


# --- what the loader reads


BOUNDS = {"nvfp4": 0.2, "mxfp8": 2e-2, "fp8": 2e-2, "int8": 1e-3}  # of the conditioning, about twice what was measured


@pytest.mark.core
@pytest.mark.parametrize("recipe", list(BOUNDS))
@pytest.mark.parametrize("name, encoder", [("flux", "t5xxl"), ("klein", "qwen3_4b")])
def test_quantized_encoder_conditions_as_its_decoded_weights_do(
    name: str, encoder: str, recipe: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = quantized(made(name), recipe, tmp_path / "q.safetensors", "model,te")
    prefix = f"text_encoders.{encoder}.transformer."
    planned = {key.removeprefix(prefix) for key in plan.quantized() if key.startswith(prefix)}
    model, clip, _ = loaded(tmp_path / "q.safetensors")
    assert layouts(clip, encoder).keys() == planned and len(planned) > 150
    inside = {key for key in plan.quantized() if key.startswith(models.PREFIX)}
    arrived = model.model.diffusion_model.named_modules()
    assert {f"{models.PREFIX}{n}" for n, m in arrived if hasattr(getattr(m, "weight", None), "_layout_cls")} == inside
    same = loaded(in_float32(made(name), tmp_path / "q.safetensors", tmp_path / "decoded.safetensors"))[1]
    found, wanted, original = conditioning(clip), conditioning(same), conditioning(loaded(made(name))[1])
    assert relative_error(found, wanted) < 1e-5
    assert 1e-7 < relative_error(found, original) < BOUNDS[recipe]


@pytest.mark.core
def test_float32_clip_and_vae_are_halved_and_load(made: Callable[[str], Path], tmp_path: Path) -> None:
    plan = quantized(made("sd15"), "int8", tmp_path / "q.safetensors", "model,te,vae")
    assert all(layer.startswith(models.PREFIX) for layer in plan.layers)
    before, after = load_file(made("sd15")), load_file(tmp_path / "q.safetensors")
    others = {key for key in before if not key.startswith(models.PREFIX)}
    assert all(torch.equal(after[key], before[key].half()) for key in others)
    (_, clip, vae), (_, clip32, vae32) = loaded(tmp_path / "q.safetensors"), loaded(made("sd15"))
    assert relative_error(conditioning(clip), conditioning(clip32)) < 1e-5  # ComfyUI keeps CLIP in float16 itself
    assert 0 < relative_error(decode(vae) - 0.5, decode(vae32) - 0.5) < 1e-5


@pytest.mark.core
def test_clip_of_a_checkpoint_stays_as_it_is(made: Callable[[str], Path], tmp_path: Path) -> None:
    """ComfyUI 0.29 and 0.33 would take scaled codes for weights, without a word."""
    quantized(made("flux"), "fp8", tmp_path / "q.safetensors", "model,te,vae")
    before, after = load_file(made("flux")), load_file(tmp_path / "q.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith(CLIP))
    assert all(after[key].dtype == torch.float16 for key in before if key.startswith("vae."))


@pytest.mark.core
def test_rows_name_the_encoders_that_the_checkpoint_loader_tells_of_scales(comfy: Path) -> None:
    """``clip_target`` of every class, asked about each name: is the class that it makes told that there are any?"""
    from comfy_classes import CASES, Built

    classes = {one.__name__: one for one in importlib.import_module("comfy.supported_models").models}
    names = {name for row in ARCHITECTURES for name in row.encoders} | {"clip_l", "clip_g", "pile_t5xl", "gemma3_12b"}
    told: dict[str, set[str]] = {}
    for case in (case for case in CASES.values() if case.name in classes):
        row = detect(shapes := Built.of(case).file_shapes, shapes)
        found = {name for name in names if _is_told(classes[case.name], name)}
        assert found or not row.encoders, case.name
        told.setdefault(row.name, set()).update(found)
    rows = {row.name: set(row.encoders) for row in ARCHITECTURES if row.name in told and row.name != "generic"}
    assert rows == {name: told[name] for name in rows}
    assert sum(map(bool, rows.values())) > 20


def _is_told(cls: type, name: str) -> bool:
    prefix = f"{cls.text_encoder_key_prefix[0]}{name}.transformer."
    ends = ("model.norm.weight", "encoder.final_layer_norm.weight", "model.layers.0.x.comfy_quant")
    try:
        target = cls.clip_target(object.__new__(cls), {prefix + end: torch.zeros(1) for end in ends})
    except (UnboundLocalError, AttributeError):  # a name that the class does not know
        return False
    make = target and getattr(target.clip.__init__, "__closure__", None)
    if not make:
        return False
    handed = zip(target.clip.__init__.__code__.co_freevars, make, strict=True)
    return any(name.endswith("quantization_metadata") and cell.cell_contents for name, cell in handed)


# --- what there is to choose


SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.label_emb.0.0.weight": (8, 8),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (32, 32),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (32, 32),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (96, 32),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}


def test_inspect_lists_the_parts(tmp_path: Path) -> None:
    path = models.save(tmp_path / "sdxl.safetensors", {key: torch.zeros(shape) for key, shape in SDXL.items()})
    found = [(part["part"], part["prefix"], part["architecture"]) for part in describe.inspect(path)["parts"]]
    assert sorted(found) == [
        ("model", "model.diffusion_model.", "sdxl"),
        ("te", "conditioner.embedders.0.transformer.", None),
        ("te", "conditioner.embedders.1.model.", None),
        ("vae", "first_stage_model.", None),
    ]


def half(path: Path) -> Path:
    return models.save(path, {key: torch.ones(shape).half() for key, shape in SDXL.items()})


@pytest.mark.parametrize(
    "tensors, kinds, problem",
    [
        (models.prefixed(models.zimage()), "te", "has no part te (text encoder): choose of model"),
        ({key: torch.ones(shape).half() for key, shape in SDXL.items()}, "te,vae", "nothing to do: of text encoder"),
    ],
)
def test_parts_that_cannot_be_chosen_are_refused(
    tensors: models.Tensors, kinds: str, problem: str, tmp_path: Path
) -> None:
    path = models.save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CalibQuantError, match=re.escape(problem)):
        Source(path, kinds=kinds.split(","))


def test_float32_above_float16_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in SDXL.items()}
    tensors["first_stage_model.decoder.conv_in.weight"][0, 0, 0, 0] = 1e6
    path = models.save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CalibQuantError, match=r"tensor first_stage_model\.decoder\.conv_in\.weight has values above"):
        quantized(path, "fp8", tmp_path / "q.safetensors", "vae")
    assert not (tmp_path / "q.safetensors").exists()


def test_a_plan_keeps_its_parts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From the command line: plan, quantize by it, compare; another choice of parts is told apart."""
    path = models.save(tmp_path / "m.safetensors", {key: torch.ones(shape) for key, shape in SDXL.items()})
    words = tmp_path / "p.json", tmp_path / "q.safetensors"
    assert main(["plan", str(path), "--recipe", "int8", "--parts", "model,vae", "-o", str(words[0])]) == 0
    assert "VAE (first_stage_model.*) stored as float16 instead of float32" in capsys.readouterr().out
    assert plans.load(words[0]).parts == ("model", "vae")
    assert main(["quantize", str(path), "--plan", str(words[0]), "-o", str(words[1]), "--verify"]) == 0
    dtypes = {key: tensor.dtype for key, tensor in load_file(words[1]).items()}
    assert dtypes["first_stage_model.decoder.conv_in.weight"] == torch.float16
    assert dtypes["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] == torch.float32
    assert main(["compare", str(path), str(words[1])]) == 0
    with Source(path) as source, pytest.raises(CalibQuantError, match="opened for other parts than the plan"):
        jobs.quantize(source, plans.load(words[0]), tmp_path / "r.safetensors")


def t5(layers: int = 24) -> models.Tensors:
    """A small T5 XXL in a Flux checkpoint, without ComfyUI."""
    kinds = {f"layer.0.SelfAttention.{k}": (32, 32) for k in "qkvo"}
    kinds |= {"layer.1.DenseReluDense.wi_0": (64, 32), "layer.1.DenseReluDense.wi_1": (64, 32)}
    shapes = {f"encoder.block.{i}.{kind}.weight": shape for i in range(layers) for kind, shape in kinds.items()}
    shapes |= {"encoder.final_layer_norm.weight": (32,), "shared.weight": (128, 32)}
    return {T5 + key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}


def flux() -> models.Tensors:
    shapes = {"img_in.weight": (64, 64), "txt_in.weight": (64, 32), "double_blocks.0.img_mod.lin.weight": (384, 64)}
    shapes |= {"single_blocks.0.linear1.weight": (448, 64), "double_blocks.0.img_attn.norm.key_norm.scale": (64,)}
    model = {key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}
    return models.prefixed(model) | t5()


def test_budget_counts_the_parts(tmp_path: Path) -> None:
    """Size is of the whole file; text encoders count as multiplied in 16 bit on every card."""
    path = models.save(tmp_path / "m.safetensors", flux())
    out = tmp_path / "q.safetensors"
    budget = ["--size", str(0.7 * path.stat().st_size / 1e9), "--gpu", "blackwell"]
    assert main(["quantize", str(path), "--parts", "model,te", *budget, "-o", str(out), "--verify"]) == 0
    assert out.stat().st_size <= 0.7 * path.stat().st_size
    with QuantizedFile(out) as file:
        configs = {layer: config for layer, config in file.configs.items() if layer.startswith(T5)}
    assert len(configs) > 100 and all(config.get("full_precision_matrix_mult") for config in configs.values())


def test_probe_reads_the_chosen_parts(tmp_path: Path) -> None:
    from quant_core.evidence import probe

    path = models.save(tmp_path / "m.safetensors", flux())
    names = {
        part: {layer.name for layer in probe.probe(path, kinds=part.split(",")).layers} for part in ("te", "model,te")
    }
    assert all(name.startswith(T5) for name in names["te"]) and len(names["te"]) == 145
    assert names["model,te"] > names["te"]


@pytest.mark.parametrize("chosen", [True, False])
def test_scaled_fp8_encoder(chosen: bool, tmp_path: Path) -> None:
    """Of the legacy dialect: dequantized where it is chosen, else copied with its scales."""
    scaled = models.legacy({key.removeprefix(T5): tensor for key, tensor in t5().items()}, T5)
    path = models.save(tmp_path / "m.safetensors", flux() | scaled.tensors)
    quantized(path, "int8", tmp_path / "q.safetensors", "model,te" if chosen else "model")
    written = load_file(tmp_path / "q.safetensors")
    key = T5 + "encoder.block.0.layer.0.SelfAttention.q"
    assert {key + ".scale_weight" in written, T5 + "scaled_fp8" in written} == {not chosen}
    if chosen:
        fmt, real = FORMATS["int8_tensorwise"], scaled.real[key + ".weight"]
        stored = {name: written[f"{key}.{name}"] for name in fmt.layout(tuple(real.shape))}
        assert relative_error(fmt.decode(stored, tuple(real.shape)), real) < 1e-3


# --- the nodes


@pytest.mark.core
def test_plan_node_saves_a_whole_checkpoint_that_load_checkpoint_loads(
    made: Callable[[str], Path], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, sd = importlib.import_module("nodes"), importlib.import_module("comfy.sd")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    monkeypatch.setattr(
        sd,
        "load_checkpoint_guess_config",
        functools.partial(sd.load_checkpoint_guess_config, te_model_options=checkpoints.OPTIONS),
    )
    shutil.copy(made("flux"), comfy / "models" / "checkpoints" / "parts.safetensors")

    def run(node: str, **inputs: Any) -> Any:
        with torch.inference_mode():
            return nodes.NODE_CLASS_MAPPINGS[node].PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)

    strategy = {"strategy": "recipe", "recipe": "fp8"}
    planned = run("CalibQuantPlan", model_name="checkpoints/parts.safetensors", strategy=strategy, parts="model,te,vae")
    assert "VAE (vae.*) stored as float16 instead of float32" in planned.ui["text"][0]
    saved = run("CalibQuantQuantize", plan=planned.result[0], filename_prefix="parts/flux")
    path = comfy / "output" / "checkpoints" / saved.result[0]
    assert path.stat().st_size == planned.result[0].size
    with torch.inference_mode():
        model, clip, vae = nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]().load_checkpoint(saved.result[0])
    assert layouts(clip, "t5xxl") and relative_error(conditioning(clip), conditioning(loaded(made("flux"))[1])) < 0.02
    assert decode(vae).isfinite().all() and type(model.model).__name__ == "Flux"
