"""Calibration in real sampling: against statistics worked out from every stored activation, and through a server."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from comfy_env import PromptInterrupted, Server, ServerError
from keys import make_keys
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core import jobs
from quant_core.evidence import calibration, collector
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.files.header import Headers
from quant_core.models.source import Source
from quant_core.planning import recipes

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
DIGITS_CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
FILES = ["CalibQuantSaveCalibration", "CalibQuantLoadCalibration"]
SETS = ["CalibQuantPromptSet", "CalibQuantLoadPromptSet"]
NODE_IDS = ["CalibQuantMonitor", "CalibQuantCalibrate", "CalibQuantSensitivity", "CalibQuantRefinePlan", *FILES, *SETS]
LAYERS = 66  # Linears of the demo model: 10 in each of 6 blocks, 6 outside
STEPS = 2
ALL_ROWS = 1 << 14  # more than these runs have
EVALUATION_SEEDS = range(1000, 1100)
Graph = dict[str, Any]


# --- in this process


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Iterator[dict[str, Any]]:
    """The pack as ComfyUI loads it: its node classes by id. What its nodes saved is removed at the end."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    yield {name: nodes.NODE_CLASS_MAPPINGS[name] for name in NODE_IDS}
    for folder in ("calibrations", "promptsets"):
        shutil.rmtree(comfy / "output" / folder, ignore_errors=True)


def execute(node: Any, **inputs: Any) -> Any:
    """Run a node as ComfyUI does."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


@pytest.fixture
def model(pack: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return importlib.import_module("nodes").UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture(scope="module")
def digits(pack: dict[str, Any]) -> list[Any]:
    """CONDITIONING of each digit."""
    prompts, _ = execute(pack["CalibQuantLoadPromptSet"], prompt_set="digits.safetensors", index=0).result
    return [[[prompt["cond"], prompt["options"]]] for prompt in prompts]


def monitor(pack: dict[str, Any], model: Any, name: str, rows: int = ALL_ROWS, reset: bool = False) -> Any:
    return execute(pack["CalibQuantMonitor"], model=model, name=name, rows=rows, reset=reset).result


def ksampler(model: Any, positive: Any, negative: Any = None, seed: int = 1, cfg: float = 1.0, **how: Any) -> Any:
    """The stock KSampler's own call."""
    sample, latent = importlib.import_module("comfy.sample"), how.pop("latent", torch.zeros(1, 16, 1, 8, 8))
    with torch.inference_mode():
        noise = sample.prepare_noise(latent, seed)
        order = (model, noise, how.pop("steps", STEPS), cfg, "euler", "simple", positive, negative or positive, latent)
        return sample.sample(*order, seed=seed, disable_pbar=True, **how)


@dataclass
class Stored:
    """Every activation of every Linear: [(input rows, output rows)] of each call, float64."""

    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def record(self, model: Any, run: Callable[[], Any]) -> Any:
        handles = []
        for name, module in model.model.diffusion_model.named_modules():
            if hasattr(module, "in_features"):
                handles.append(module.register_forward_hook(self._keep(name.replace("_orig_mod.", ""))))
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_module: Any, args: Any, output: torch.Tensor) -> None:
            pair = (args[0], output)
            self.calls[name].append(tuple(t.detach().double().reshape(-1, t.shape[-1]).clone() for t in pair))

        return keep


def close(found: Any, expected: Any, what: str, scale: Any = None) -> None:
    """Equal to 1e-5 of the largest value, or of `scale`."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    scale = expected.abs().max().clamp(min=1e-30) if scale is None else scale
    assert ((found - expected).abs().max() / scale).item() < 1e-5, what


def check_statistics(found: Calibration, stored: Stored) -> None:
    assert set(found.layers) == set(stored.calls)
    for name, calls in stored.calls.items():
        stats, x, y = found.layers[name], torch.cat([c[0] for c in calls]), torch.cat([c[1] for c in calls])
        assert (stats.count, stats.calls) == (len(x), len(calls)), name
        close(stats.input_mean, x.mean(0), name, x.abs().mean())
        close(stats.input_absmean, x.abs().mean(0), name)
        close(stats.input_sqmean, x.square().mean(0), name)
        close(stats.input_amax, x.abs().amax(0), name)
        rms = y.square().mean().sqrt()  # a mean of both signs may be next to nothing
        close(stats.output_channel_mean, y.mean(0), name, rms)
        close(stats.output_channel_sqmean, y.square().mean(0), name)
        close(stats.output_mean, torch.stack([c[1].mean() for c in calls]).mean(), name, rms)
        close(stats.output_sqmean, torch.stack([c[1].square().mean() for c in calls]).mean(), name)


def check_rows(found: Calibration, stored: Stored) -> None:
    """With room for all rows: exactly the inputs, in some order."""
    for name, calls in stored.calls.items():
        x = torch.cat([c[0] for c in calls]).bfloat16().float()
        rows = found.rows_of(name).float()
        assert rows.shape == x.shape, name
        assert torch.equal(torch.unique(rows, dim=0), torch.unique(x, dim=0)), name


def hooks_on(model: Any) -> int:
    modules = list(model.model.diffusion_model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_statistics_equal_those_of_all_stored_activations(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    watched, handle = monitor(pack, model, "exact")
    stored = Stored()
    for digit in (3, 8):
        plain = stored.record(model, lambda d=digit: ksampler(model, digits[d], digits[0], cfg=2.0))
        seen = ksampler(watched, digits[digit], digits[0], cfg=2.0)
        assert torch.equal(plain, seen)  # bit-identical
    found = handle.current()
    assert len(found.layers) == LAYERS
    check_statistics(found, stored)
    check_rows(found, stored)
    assert hooks_on(model) == 0
    assert found.info["cond_rows"] == found.info["uncond_rows"] == 2 * STEPS
    assert sum(found.info["sigmas"].values()) == 2 * STEPS and "1" in found.info["sigmas"]


def test_file_says_where_it_comes_from(pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path) -> None:
    watched, handle = monitor(pack, model, "sub/provenance", rows=16)
    for seed in (5, 6):
        ksampler(watched, digits[1], seed=seed)
    saved = calibration.load(comfy / "output" / "calibrations" / "sub" / "provenance.calibration.safetensors")
    with Headers(DEMO) as source:
        fingerprint = source.fingerprint()
    assert saved.info["source_file"] == MODEL and saved.info["source_fingerprint"] == fingerprint
    assert (saved.info["architecture"], saved.info["seeds"], saved.info["steps"]) == ("wan", [5, 6], [STEPS])
    assert (saved.info["sampler"], saved.info["cfg"]) == (["euler"], [1.0])
    assert saved.info["resolution"] == [[1, 16, 1, 8, 8]]
    assert saved.info["comfyui"] == importlib.import_module("comfyui_version").__version__
    assert saved.info == handle.current().info


def test_layers_with_one_input_share_one_row_sample(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    watched, handle = monitor(pack, model, "shared", rows=24)
    ksampler(watched, digits[1])
    found = handle.current()
    q, k, v = (found.layers[f"blocks.0.self_attn.{part}"] for part in "qkv")
    assert q.group == k.group == v.group and found.rows_of("blocks.0.self_attn.k") is found.rows[q.group].rows
    assert found.layers["blocks.1.self_attn.q"].group != q.group
    texts = {found.layers[f"blocks.{i}.cross_attn.{part}"].group for i in range(6) for part in "kv"}
    assert len(texts) == 1  # one text for all blocks
    assert len(found.rows) < LAYERS and all(len(sample.rows) <= 24 for sample in found.rows.values())


def test_runs_of_two_samplers_and_two_queues_add_up(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    stored = Stored()
    for digit, seed in ((1, 1), (2, 2), (1, 3), (2, 4)):
        stored.record(model, lambda d=digit, s=seed: ksampler(model, digits[d], seed=s))
    for queue, seeds in enumerate([(1, 2), (3, 4)]):
        watched, handle = monitor(pack, model, "queues")  # queued again with the node's output evicted
        for digit, seed in zip((1, 2), seeds, strict=True):
            ksampler(watched, digits[digit], seed=seed)
        assert len(handle.current().info["runs"]) == 2 * (queue + 1)
    check_statistics(handle.current(), stored)
    check_rows(handle.current(), stored)


def restart(pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left after ComfyUI was closed: files."""
    monkeypatch.setattr(sys.modules[pack["CalibQuantMonitor"].__module__], "_MONITORS", {})


def test_file_goes_on_after_a_restart_unless_reset(
    pack: dict[str, Any], model: Any, digits: list[Any], monkeypatch: pytest.MonkeyPatch, comfy: Path
) -> None:
    stored = Stored()
    for seed in (1, 1):
        stored.record(model, lambda s=seed: ksampler(model, digits[4], seed=s))
        watched, _ = monitor(pack, model, "restarted")
        ksampler(watched, digits[4], seed=seed)
        restart(pack, monkeypatch)
    path = comfy / "output" / "calibrations" / "restarted.calibration.safetensors"
    saved = calibration.load(path)
    check_statistics(saved, stored)
    check_rows(saved, stored)
    assert saved.info["runs"] == ["seed 1", "seed 1"] and saved.info["seeds"] == [1]
    for sample in saved.rows.values():  # the same run again draws other rows
        assert len(set(sample.keys)) == len(sample.keys)
    watched, handle = monitor(pack, model, "restarted", reset=True)
    assert not handle.current().layers
    ksampler(watched, digits[4], seed=9)
    assert calibration.load(path).info["seeds"] == [9]


def test_reset_runs_each_time_and_nothing_else_does(pack: dict[str, Any]) -> None:
    node = pack["CalibQuantMonitor"]
    on, off = (node.fingerprint_inputs(model=None, name="x", rows=1, reset=reset) for reset in (True, False))
    assert on != on and off == off


def test_row_limit_may_change_and_a_deleted_file_begins_anew(
    pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path
) -> None:
    for rows, runs in ((20, 1), (8, 2)):
        watched, handle = monitor(pack, model, "limits", rows=rows)
        ksampler(watched, digits[2], seed=rows)
        assert len(handle.current().info["runs"]) == runs
        assert max(len(sample.rows) for sample in handle.current().rows.values()) == rows
    (comfy / "output" / "calibrations" / "limits.calibration.safetensors").unlink()
    _, handle = monitor(pack, model, "limits", rows=8)
    assert not handle.current().layers


def test_another_models_file_is_refused(
    pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, _ = monitor(pack, model, "taken", rows=0)
    ksampler(watched, digits[0])
    other = {name: tensor + 1 if name == "head.head.weight" else tensor for name, tensor in load_file(DEMO).items()}
    path = models.save(comfy / "models" / "diffusion_models" / "other.safetensors", other, demo_metadata())
    with torch.inference_mode():
        stranger = importlib.import_module("comfy.sd").load_diffusion_model(str(path))
    path.unlink()
    message = r"^the file holds the calibration of another model \(calibquant_digits_wan.*\(taken\.calibration\.safe"
    for _ in range(2):  # with the monitor in memory, then from the file
        with pytest.raises(Exception, match=message):
            monitor(pack, stranger, "taken", rows=0)
        restart(pack, monkeypatch)
    monitor(pack, stranger, "taken", rows=0, reset=True)


def demo_metadata() -> dict[str, str]:
    with safe_open(DEMO, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", ["../outside", "", "a/../../b", "a//b"])
def test_name_cannot_leave_its_folder(pack: dict[str, Any], model: Any, name: str) -> None:
    with pytest.raises(Exception, match=r"name .* is no name inside output/calibrations"):
        monitor(pack, model, name)


def stopping(error: type[BaseException]) -> Callable[..., None]:
    def callback(step: int, *_: Any) -> None:
        raise error(f"at step {step}")

    return callback


def test_cancel_and_failure_leave_no_hook_and_no_trace(
    pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path
) -> None:
    interrupt = importlib.import_module("comfy.model_management").InterruptProcessingException
    watched, handle = monitor(pack, model, "stopped")
    stored = Stored()
    stored.record(model, lambda: ksampler(model, digits[7], seed=3))
    ksampler(watched, digits[7], seed=3)
    path = comfy / "output" / "calibrations" / "stopped.calibration.safetensors"
    before = path.read_bytes()
    for error in (interrupt, ValueError):
        with pytest.raises(error):
            ksampler(watched, digits[6], seed=4, callback=stopping(error))
        assert hooks_on(model) == 0
    assert path.read_bytes() == before
    check_statistics(handle.current(), stored)
    assert handle.current().info["runs"] == ["seed 3"] and handle.current().info["seeds"] == [3]


def test_nan_is_an_error_that_names_layer_and_step(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    watched, handle = monitor(pack, model, "nan")
    layer = model.model.diffusion_model.blocks[2].ffn[0]
    calls = []

    def spoil(_module: Any, args: Any) -> tuple[torch.Tensor] | None:
        calls.append(1)
        return (torch.full_like(args[0], float("nan")),) if len(calls) == 2 else None

    spoiler = layer.register_forward_pre_hook(spoil)
    with pytest.raises(Exception, match=r"layer blocks\.2\.ffn\.0: NaN or Inf in its input or output at step 2"):
        ksampler(watched, digits[5])
    spoiler.remove()
    assert not handle.current().layers and hooks_on(model) == 0
    ksampler(watched, digits[5])
    found = handle.current()
    assert all(sample.rows.isfinite().all() for sample in found.rows.values())
    assert all(stats.input_sqmean.isfinite().all() for stats in found.layers.values())


def test_lora_is_part_of_what_is_seen(pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path) -> None:
    generator, key = torch.Generator().manual_seed(0), "diffusion_model.blocks.1.ffn.0"
    rows, cols = load_file(DEMO)["blocks.1.ffn.0.weight"].shape
    shapes = {"lora_down": (4, cols), "lora_up": (rows, 4)}
    tensors = {f"{key}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, comfy / "models" / "loras" / "seen.safetensors")
    watched, handle = monitor(pack, model, "lora")
    with torch.inference_mode():
        load = importlib.import_module("nodes").LoraLoaderModelOnly().load_lora_model_only
        (plain,), (watched,) = (load(m, "seen.safetensors", 0.5) for m in (model, watched))
    stored = Stored()
    samples = stored.record(plain, lambda: ksampler(plain, digits[2]))
    assert torch.equal(samples, ksampler(watched, digits[2]))
    assert not torch.equal(samples, ksampler(model, digits[2]))
    check_statistics(handle.current(), stored)
    assert handle.current().info["patched_tensors"] == [1]


def test_compiled_model_is_seen_in_full(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    compiled = model.clone()
    compiled.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    ksampler(compiled, digits[1], seed=8)  # traced before there is any hook
    watched, handle = monitor(pack, compiled, "compiled", rows=4)
    ksampler(watched, digits[1], seed=8)
    stored = Stored()
    stored.record(model, lambda: ksampler(model, digits[1], seed=8))
    check_statistics(handle.current(), stored)


def test_quantized_layers_are_seen(pack: dict[str, Any], digits: list[Any], tmp_path: Path) -> None:
    with Source(DEMO) as source:
        jobs.quantize(source, recipes.make_plan(source, "fp8"), tmp_path / "q.safetensors")
    with torch.inference_mode():
        mixed = importlib.import_module("comfy.sd").load_diffusion_model(str(tmp_path / "q.safetensors"))
    kinds = {type(m).__mro__[1].__name__ for m in mixed.model.diffusion_model.modules() if hasattr(m, "in_features")}
    assert "Module" in kinds  # comfy.ops' mixed-precision Linear is no nn.Linear
    watched, handle = monitor(pack, mixed, "mixed", rows=4)
    ksampler(watched, digits[1])
    assert len(handle.current().layers) == LAYERS


# --- other families: (class of tests/keys, smaller configuration, text [tokens, width], options, latent)

FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int], dict[str, Any], tuple[int, ...]]] = {
    "wan": (
        "wan21_t2v_14b", dict(dim=128, ffn_dim=264, num_heads=1, num_layers=2, text_dim=4096), (6, 4096), {},
        (1, 16, 1, 8, 8),
    ),
    "flux": (
        "flux_dev",
        dict(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=32),
        (6, 64), {"pooled_output": (1, 32), "guidance": 3.5}, (1, 16, 8, 8),
    ),
    "sd15": (
        "sd15", dict(channel_mult=[1], num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1],
                     transformer_depth_middle=-2), (6, 768), {}, (1, 4, 8, 8),
    ),
    "zimage": (
        "zimage", dict(dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64), (6, 64), {},
        (1, 16, 8, 8),
    ),
}  # fmt: skip


def tiny(family: str) -> Any:
    """A random model of the family, loaded by ComfyUI; Z-Image past detection, which wants its full width."""
    variant, changes = FAMILIES[family][:2]
    module, cls, config = make_keys.MODELS[variant]
    operations = importlib.import_module("comfy.ops").disable_weight_init
    build = getattr(importlib.import_module(module), cls)
    shapes = build(**(config | changes), device="meta", dtype=torch.float32, operations=operations).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.empty(t.shape).normal_(std=0.05, generator=generator) for k, t in shapes.items()}
    with torch.inference_mode():
        if family == "zimage":
            return past_detection(config | changes, state)
        return importlib.import_module("comfy.sd").load_diffusion_model_state_dict(state)


def past_detection(config: dict[str, Any], state: models.Tensors) -> Any:
    management, patcher = (importlib.import_module(f"comfy.{name}") for name in ("model_management", "model_patcher"))
    found = importlib.import_module("comfy.supported_models").ZImage({"image_model": "lumina2", **config})
    device = management.get_torch_device()
    found.set_inference_dtype(torch.float32, None, device=device)
    model = patcher.CoreModelPatcher(found.get_model({}), device, management.unet_offload_device())
    model.model.load_model_weights(state, "", assign=model.is_dynamic())
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_linear_of_the_family_is_seen(family: str, pack: dict[str, Any]) -> None:
    _, _, text, options, shape = FAMILIES[family]
    plain, generator = tiny(family), torch.Generator().manual_seed(1)
    options = {k: torch.randn(v, generator=generator) if isinstance(v, tuple) else v for k, v in options.items()}
    positive, negative = ([[torch.randn(1, *text, generator=generator), options]] for _ in range(2))
    latent = torch.zeros(shape)
    watched, handle = monitor(pack, plain, f"family_{family}")
    stored = Stored()
    expected = stored.record(plain, lambda: ksampler(plain, positive, negative, cfg=3.0, latent=latent))
    assert torch.equal(expected, ksampler(watched, positive, negative, cfg=3.0, latent=latent))
    found = handle.current()
    linears = {n for n, m in plain.model.diffusion_model.named_modules() if hasattr(m, "in_features")}
    assert set(found.layers) == linears and len(linears) > 10
    assert found.info["architecture"] == family
    check_statistics(found, stored)
    check_rows(found, stored)  # of each layer its own, shared or not: a wrong group would show here
    assert len(found.rows) < len(linears)
    assert hooks_on(plain) == 0


# --- Calibrate


def settings(**changes: Any) -> dict[str, Any]:
    how = {"samples": 3, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 50}
    return {**how, "width": 64, "height": 64, "frames": 1, "rows": ALL_ROWS, **changes}


def prompt_set(pack: dict[str, Any]) -> list[dict[str, Any]]:
    return execute(pack["CalibQuantLoadPromptSet"], prompt_set="digits.safetensors", index=0).result[0]


def test_calibrate_samples_prompts_in_turn(pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path) -> None:
    output = execute(pack["CalibQuantCalibrate"], model=model, conditioning=prompt_set(pack)[:2], **settings())
    found = output.result[0].current()
    stored = Stored()
    for i, digit in enumerate([0, 1, 0]):
        stored.record(model, lambda d=digit, s=50 + i: ksampler(model, digits[d], seed=s))
    check_statistics(found, stored)
    check_rows(found, stored)
    assert found.info["prompts"] == ["0", "1"] and found.info["seeds"] == [50, 51, 52]
    assert (found.info["scheduler"], found.info["steps"]) == (["simple"], [STEPS])
    assert f"{LAYERS} layers" in output.ui.value and "3 runs" in output.ui.value
    assert not list((comfy / "output" / "calibrations" / "unfinished").iterdir())
    assert hooks_on(model) == 0


def test_calibrate_tells_progress_over_all_samples(
    pack: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preview, utils = importlib.import_module("latent_preview"), importlib.import_module("comfy.utils")
    bar, texts = [], []

    class Bar:
        def __init__(self, total: int) -> None:
            bar.append((0, total, None))

        def update_absolute(self, *values: Any) -> None:
            bar.append(values)

    monkeypatch.setattr(utils, "ProgressBar", Bar)
    monkeypatch.setattr(preview.args, "preview_method", preview.LatentPreviewMethod.Latent2RGB)
    feedback = sys.modules[pack["CalibQuantCalibrate"].__module__].feedback
    monkeypatch.setattr(feedback, "show", lambda _node, text: texts.append(text))
    execute(pack["CalibQuantCalibrate"], model=model, conditioning=prompt_set(pack), **settings())
    assert [(done, total) for done, total, _ in bar] == [(i, 3 * STEPS) for i in range(3 * STEPS + 1)]
    assert all(picture[0] == "JPEG" and picture[1].size == (8, 8) for _, _, picture in bar[1:])
    assert re.fullmatch(r"sample 1 of 3 · \d+ s left\n0", texts[0])


def test_calibrate_takes_one_conditioning_and_a_negative(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    node, how = pack["CalibQuantCalibrate"], settings(samples=2, cfg=3.0)
    found = execute(node, model=model, conditioning=digits[4], negative=digits[0], **how).result[0].current()
    assert found.info["cond_rows"] == found.info["uncond_rows"] == 2 * STEPS and "prompts" not in found.info
    with pytest.raises(Exception, match=r"cfg 3 needs a negative prompt: link one to negative, or set cfg to 1"):
        execute(node, model=model, conditioning=digits[4], **how)


def test_calibrate_video_has_the_models_latent(pack: dict[str, Any], model: Any, digits: list[Any]) -> None:
    how = settings(samples=1, steps=1, frames=9, width=48, height=64, rows=1)
    found = execute(pack["CalibQuantCalibrate"], model=model, conditioning=digits[4], **how).result[0].current()
    assert found.info["resolution"] == [[1, 16, 3, 8, 6]]  # Wan: 4 frames and 8 x 8 pixels to one


def test_cancelled_calibrate_keeps_finished_runs_on_disk(
    pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    management = importlib.import_module("comfy.model_management")
    sample, seeds = importlib.import_module("comfy.sample"), []
    prepare_noise = sample.prepare_noise

    def remember(latent: torch.Tensor, seed: int) -> torch.Tensor:
        seeds.append(seed)
        return prepare_noise(latent, seed)

    def cancel_in_the_third_run() -> None:
        if len(seeds) == 3:
            raise management.InterruptProcessingException

    monkeypatch.setattr(sample, "prepare_noise", remember)
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel_in_the_third_run)
    told: list[str] = []
    feedback = sys.modules[pack["CalibQuantCalibrate"].__module__].feedback
    monkeypatch.setattr(feedback, "tell_kept", lambda _node, text: told.append(text))
    how = {"model": model, "conditioning": digits[1], **settings(samples=5, rows=100)}
    with pytest.raises(management.InterruptProcessingException):
        execute(pack["CalibQuantCalibrate"], **how)
    (path,) = (comfy / "output" / "calibrations" / "unfinished").iterdir()
    where = f"output/calibrations/unfinished/{path.name}"
    assert told == [f"2 of 5 samples are in {where}: run again with the same settings for the rest"]
    assert path.name.startswith("calibquant_digits_wan_")
    assert calibration.load(path).info["seeds"] == [50, 51]
    assert hooks_on(model) == 0
    monkeypatch.undo()
    other = execute(pack["CalibQuantCalibrate"], **{**how, "seed": 51, "samples": 1})
    assert "continued" not in other.ui.value and path.exists()  # another job
    check_continued(execute(pack["CalibQuantCalibrate"], **how), execute(pack["CalibQuantCalibrate"], **how))
    path.write_bytes(b"damaged")
    assert execute(pack["CalibQuantCalibrate"], **how).result[0].current().info["seeds"] == [50, 51, 52, 53, 54]
    assert not path.exists()


def check_continued(continued: Any, whole: Any) -> None:
    """Nothing tells it from a run without an interruption but the order of its rows and the last bits of its means."""
    assert continued.ui.value == "continued: 2 of 5 samples were done before\n" + whole.ui.value
    found, wanted = continued.result[0].current(), whole.result[0].current()
    assert found.info["runs"] == wanted.info["runs"] and found.info["seeds"] == [50, 51, 52, 53, 54]
    for name, stats in wanted.layers.items():
        assert (stats.count, stats.calls) == (found.layers[name].count, found.layers[name].calls)
        close(found.layers[name].input_sqmean, stats.input_sqmean, name)
    assert 100 in (len(sample.keys) for sample in wanted.rows.values())  # of more
    for name, sample in wanted.rows.items():
        a, b = np.argsort(found.rows[name].keys), np.argsort(sample.keys)
        assert np.array_equal(found.rows[name].keys[a], sample.keys[b])
        assert np.array_equal(found.rows[name].runs[a], sample.runs[b])
        assert torch.equal(found.rows[name].rows[torch.from_numpy(a)], sample.rows[torch.from_numpy(b)])


# --- files


def test_save_waits_merges_and_loads(pack: dict[str, Any], model: Any, digits: list[Any], comfy: Path) -> None:
    save, load = (pack[name] for name in FILES)
    watched, handle = monitor(pack, model, "to_save", rows=64)
    with pytest.raises(Exception, match="nothing was collected yet: link the sampler's LATENT to after"):
        execute(save, calibration=handle, filename_prefix="x")
    ksampler(watched, digits[1], seed=1)
    text = execute(save, calibration=handle, filename_prefix="part/m").ui["text"][0]
    assert text.splitlines()[0] == "m_00001_.calibration.safetensors"
    assert f"{LAYERS} layers" in text and "32 rows" in text and "1 run" in text and "loudest/median" in text
    first = str(Path("part") / "m_00001_.calibration.safetensors")
    loaded = execute(load, calibration_name=first).result[0].current()
    assert loaded.info == handle.current().info

    _, second = monitor(pack, model, "to_save_2", rows=64)
    other, second = monitor(pack, model, "to_save_2", rows=64)
    ksampler(other, digits[2], seed=2)
    ksampler(watched, digits[2], seed=2)
    execute(save, calibration=second, filename_prefix="part/m", merge_with=first)
    merged = calibration.load(comfy / "output" / "calibrations" / "part" / "m_00002_.calibration.safetensors")
    together = handle.current()
    assert set(merged.info["seeds"]) == {1, 2} and len(merged.info["runs"]) == 2
    for name, stats in together.layers.items():
        assert merged.layers[name].count == stats.count
        close(merged.layers[name].input_sqmean, stats.input_sqmean, name)
        close(merged.layers[name].output_sqmean, stats.output_sqmean, name)
        assert len(merged.rows_of(name)) == len(together.rows_of(name))


def collected(first: int, count: int, rows: int, seed: int) -> Calibration:
    """Inputs are the numbers first … first + count - 1, one a call."""
    seen = Collector(lambda layer: "", rows, seed)
    seen.start_run("")
    for value in range(first, first + count):
        seen.add("layer", torch.full((1, 1), float(value)), torch.ones(1, 1))
    seen.finish_run()
    return seen.result()


def test_merged_rows_are_uniform_whatever_the_row_limits() -> None:
    share = []
    for seed in range(60):
        small, large = collected(0, 128, 8, seed), collected(128, 128, 64, 1000 + seed)
        values = calibration.merge(small, large, 64).rows_of("layer").flatten().float()
        share.append((values < 128).float().mean().item())
        assert 8 <= len(values) <= 64
    assert 0.42 < sum(share) / len(share) < 0.58  # both saw 128 rows; cutting at 64 alone would give 8 / 64 = .12


def test_rows_that_wait_on_the_device_are_bounded_at_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, limit = collected(0, 300, 16, 5), 6  # bytes: three rows of one bfloat16
    monkeypatch.setattr(collector, "PENDING", limit)
    flush, most = collector._Reservoir.flush, []

    def note(reservoir: Any) -> None:
        most.append(sum(rows.nbytes for _, rows in reservoir._pending))
        flush(reservoir)

    monkeypatch.setattr(collector._Reservoir, "flush", note)
    found = collected(0, 300, 16, 5)
    assert torch.equal(found.rows_of("layer"), expected.rows_of("layer"))
    assert len(most) > 3 and max(most) <= limit + 2


class FakeClip:
    """What the stock text encoders answer: a tensor of its own for each text, and options of all kinds."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[list[Any]]:
        generator = torch.Generator().manual_seed(len(text))
        cond = torch.randn(1, 4 + len(text) % 3, 8, generator=generator)
        options = {"pooled_output": cond[:, 0], "attention_mask": torch.ones(1, cond.shape[1], dtype=torch.int64)}
        return [[cond, {**options, "num_tokens": cond.shape[1], "unused": None}]]


def test_prompts_are_encoded_and_saved_once(pack: dict[str, Any]) -> None:
    encode, load = (pack[name] for name in SETS)
    output = execute(encode, clip=FakeClip(), prompts="a red fox\n\n  two blue birds \n", name="tests/foxes")
    (made,) = output.result
    assert [prompt["text"] for prompt in made] == ["a red fox", "two blue birds"]
    assert output.ui.value == "2 prompts saved as foxes.safetensors"
    loaded, conditioning = execute(load, prompt_set=str(Path("tests") / "foxes.safetensors"), index=1).result
    assert [prompt["text"] for prompt in loaded] == ["a red fox", "two blue birds"]
    for before, after in zip(made, loaded, strict=True):
        assert torch.equal(before["cond"], after["cond"]) and before["options"].keys() == after["options"].keys()
        assert torch.equal(before["options"]["pooled_output"], after["options"]["pooled_output"])
        assert after["options"]["attention_mask"].dtype == torch.int64
        assert after["options"]["num_tokens"] == before["cond"].shape[1]
    assert torch.equal(conditioning[0][0], made[1]["cond"])


def test_empty_box_means_the_prompts_that_ship(pack: dict[str, Any]) -> None:
    (made,) = execute(pack["CalibQuantPromptSet"], clip=FakeClip(), prompts=" \n", name="varied").result
    texts = [prompt["text"] for prompt in made]
    assert len(texts) == len(set(texts)) == 64 and not any(text.startswith("#") for text in texts)


# --- what ships with the pack


def described(inputs: list[Any]) -> Iterator[tuple[str, str | None]]:
    for entry in inputs:
        yield entry.display_name or entry.id, entry.tooltip


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_and_output_is_explained(pack: dict[str, Any], node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    assert schema.category == "quantization/CalibQuant"
    page = (models.ROOT / "js" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    for name, tooltip in [*described(schema.inputs), *described(schema.outputs)]:
        assert tooltip and len(tooltip) > 10, name
        assert f"**{name}**" in page, f"{node_id}.md does not explain {name}"
    for heading in ("## Inputs", "## Output", "## Example", "## What goes wrong"):
        assert heading in page


def test_shipped_calibration_is_of_the_shipped_model_and_of_seeds_not_used_to_judge(pack: dict[str, Any]) -> None:
    found = execute(pack["CalibQuantLoadCalibration"], calibration_name=DIGITS_CALIBRATION.name).result[0].current()
    with Source(DEMO) as source:
        assert found.info["source_fingerprint"] == source.checkpoint.fingerprint()
        assert set(found.layers) == set(source.layers) | (set(found.layers) - set(source.layers))
        for layer in source.layers:
            assert found.layers[layer].input_sqmean.shape == (source.shape(layer)[1],)
            assert 0 < len(found.rows_of(layer)) <= 128
    assert sorted(found.info["prompts"]) == [str(digit) for digit in range(10)]
    assert len(found.info["seeds"]) >= 10 and not set(found.info["seeds"]) & set(EVALUATION_SEEDS)
    assert DIGITS_CALIBRATION.stat().st_size < 3e6


# --- through a real server


def api_twin(name: str) -> Graph:
    return json.loads((models.ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def of_type(graph: Graph, class_type: str) -> str:
    return next(node_id for node_id, node in graph.items() if node["class_type"] == class_type)


def test_prompts_workflow_runs(server: Server) -> None:
    graph = api_twin("calibrate_with_prompts")
    node, save = of_type(graph, "CalibQuantCalibrate"), of_type(graph, "CalibQuantSaveCalibration")
    samples = graph[node]["inputs"]["samples"]
    (text,) = server.post(graph)["outputs"][save]["text"]
    assert f"{samples} runs" in text and f"{LAYERS} layers" in text
    prefix = graph[save]["inputs"]["filename_prefix"]
    found = calibration.load(server.output_dir / "calibrations" / f"{prefix}_00001_.calibration.safetensors")
    assert sorted(found.info["prompts"]) == [str(digit) for digit in range(10)] and len(found.info["runs"]) == samples


def test_monitor_workflow_collects_run_by_run_and_changes_no_picture(server: Server) -> None:
    graph = api_twin("monitor_my_own_graph")
    node, sampler = of_type(graph, "CalibQuantMonitor"), of_type(graph, "KSampler")
    save, picture = of_type(graph, "CalibQuantSaveCalibration"), of_type(graph, "PreviewImage")
    seed, pictures = graph[sampler]["inputs"]["seed"], []
    for runs in (1, 2):
        graph[sampler]["inputs"]["seed"] = seed + runs
        outputs = server.post(graph)["outputs"]
        assert f"· {runs} run" in outputs[save]["text"][0] and f"{LAYERS} layers" in outputs[save]["text"][0]
        pictures.append(_picture(server, outputs[picture]))
    plain = {k: v for k, v in graph.items() if k not in (node, save)}
    plain[sampler]["inputs"]["model"] = graph[node]["inputs"]["model"]
    assert _picture(server, server.post(plain)["outputs"][picture]) == pictures[1] != pictures[0]
    name = graph[node]["inputs"]["name"]
    found = calibration.load(server.output_dir / "calibrations" / f"{name}.calibration.safetensors")
    assert found.info["seeds"] == [seed + 1, seed + 2]


def _picture(server: Server, output: dict[str, Any]) -> bytes:
    """Pixels only: the file also holds the graph."""
    (image,) = output["images"]
    with Image.open(server.base_dir / "temp" / image["subfolder"] / image["filename"]) as file:
        return file.tobytes()


def test_cancel_of_a_real_calibrate_keeps_its_runs(server: Server) -> None:
    graph = api_twin("calibrate_with_prompts")
    graph[of_type(graph, "CalibQuantCalibrate")]["inputs"] |= {"samples": 4000, "seed": 7}
    folder = server.output_dir / "calibrations" / "unfinished"
    others = set(folder.glob("*.safetensors"))  # the browser's tests cancel, too
    prompt = server.submit(graph)
    deadline = time.monotonic() + 60
    while not set(folder.glob("*.safetensors")) - others and time.monotonic() < deadline:
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(PromptInterrupted):
        server.wait(prompt)
    (path,) = set(folder.glob("*.safetensors")) - others
    assert calibration.load(path).info["seeds"][0] == 7
    path.unlink()


def test_saving_before_sampling_is_one_clear_line(server: Server) -> None:
    graph = api_twin("monitor_my_own_graph")
    save, node = of_type(graph, "CalibQuantSaveCalibration"), of_type(graph, "CalibQuantMonitor")
    del graph[save]["inputs"]["after"]
    graph[node]["inputs"]["name"] = "never_sampled"
    only = {k: graph[k] for k in (save, node, graph[node]["inputs"]["model"][0])}
    with pytest.raises(ServerError, match=r"^node \d+ \(CalibQuantSaveCalibration\): nothing was collected[^\n]*\n"):
        server.post(only)
