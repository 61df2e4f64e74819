"""Videos: expert pairs (Wan 2.2), each calibrated by its own steps alone, and comparisons of several frames.

The pair is the demo model and a perturbed copy of it; ComfyUI's own KSampler (Advanced) draws what ours must equal.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core import jobs
from quant_core.cli import main
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.histogram import histogram, sigma_range
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.reports import sheet

DEMO = models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
HIGH, LOW = "expert_high_noise.safetensors", "expert_low_noise.safetensors"
STEPS, SWITCH, SEED = 8, 3, 5
HOW = {"steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "width": 64, "height": 64}
HOW |= {"frames": 5, "seed": SEED}
LATENT = (1, 16, 2, 8, 8)  # of 5 frames

pytestmark = pytest.mark.core


def perturbed(path: Path, seed: int) -> Path:
    """A fine-tune of the demo model, with its header."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(DEMO)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = (tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
    with safe_open(DEMO, "pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    return path


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Iterator[dict[str, Any]]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    files = [perturbed(comfy / "models" / "diffusion_models" / name, i) for i, name in enumerate((HIGH, LOW))]
    yield nodes.NODE_CLASS_MAPPINGS
    for path in files:
        path.unlink()
    for folder in ("calibrations", "comparisons"):
        shutil.rmtree(comfy / "output" / folder, ignore_errors=True)


def execute(node: Any, **inputs: Any) -> Any:
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def load(name: str, shift: float = 5.0) -> Any:
    """As a user's graph has it: Load Diffusion Model, ModelSamplingSD3."""
    sd3 = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingSD3
    with torch.inference_mode():
        return sd3().patch(importlib.import_module("nodes").UNETLoader().load_unet(name, "default")[0], shift)[0]


@pytest.fixture
def pair(pack: dict[str, Any]) -> tuple[Any, Any]:
    return load(HIGH), load(LOW)


@pytest.fixture(scope="module")
def digit(pack: dict[str, Any]) -> Any:
    return execute(pack["CalibQuantLoadPromptSet"], prompt_set="digits.safetensors", index=4).result[1]


def two_samplers(high: Any, low: Any, positive: Any, seed: int = SEED) -> torch.Tensor:
    """Two KSampler (Advanced), as ComfyUI's workflow for Wan 2.2 links them."""
    sampler = importlib.import_module("nodes").KSamplerAdvanced()
    order = (STEPS, 1.0, "euler", "simple", positive, positive)
    with torch.inference_mode():
        (noisy,) = sampler.sample(high, "enable", seed, *order, {"samples": torch.zeros(LATENT)}, 0, SWITCH, "enable")
        (final,) = sampler.sample(low, "disable", seed, *order, noisy, SWITCH, 10000, "disable")
    return final["samples"]


def levels(model: Any) -> list[float]:
    sampling = model.get_model_object("model_sampling")
    return importlib.import_module("comfy.samplers").calculate_sigmas(sampling, "simple", STEPS)[:-1].tolist()


def seen(found: Calibration) -> list[float]:
    return sorted((float(sigma) for sigma in found.info["sigmas"]), reverse=True)


def calibrate(pack: dict[str, Any], model: Any, low: Any, conditioning: Any, samples: int = 2, **words: Any) -> Any:
    inputs = {"model": model, "low_noise_model": low, "conditioning": conditioning, "switch_at_step": SWITCH}
    return execute(pack["CalibQuantCalibrate"], **inputs | {"samples": samples, "rows": 64} | HOW | words)


def both(done: Any) -> tuple[Calibration, Calibration]:
    high, low = (handle.current() for handle in done.result)
    return high, low


# --- each expert by its own steps


def test_monitors_in_the_users_own_graph_see_their_experts_steps(
    pack: dict[str, Any], pair: Any, digit: Any, comfy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = [
        execute(pack["CalibQuantMonitor"], model=model, name=f"pair_{i}", rows=64, reset=False).result[0]
        for i, model in enumerate(pair)
    ]
    assert torch.equal(two_samplers(*watched, digit), two_samplers(*pair, digit))
    files = [comfy / "output" / "calibrations" / f"pair_{i}.calibration.safetensors" for i in range(2)]
    high, low = (calibration.load(path) for path in files)
    assert seen(high) == pytest.approx(levels(pair[0])[:SWITCH], rel=1e-3)
    assert seen(low) == pytest.approx(levels(pair[0])[SWITCH:], rel=1e-3)
    assert (high.info["source_file"], low.info["source_file"]) == (HIGH, LOW)
    for path in files:
        assert main(["calibration", "info", str(path)]) == 0
    shown = capsys.readouterr().out.split("calls of the model:")
    assert "sigma   0.9 - 1          3 ####" in shown[1] and "sigma     0 - 0.1        0\n" in shown[2]


def test_calibrate_draws_a_pair_as_two_samplers_do(pack: dict[str, Any], pair: Any, digit: Any) -> None:
    """The same statistics and rows, number for number, as monitors of the stock samplers collect."""
    found = both(calibrate(pack, *pair, digit))
    monitors = [
        execute(pack["CalibQuantMonitor"], model=model, name=f"stock_{i}", rows=64, reset=False).result
        for i, model in enumerate(pair)
    ]
    for seed in (SEED, SEED + 1):
        two_samplers(monitors[0][0], monitors[1][0], digit, seed)
    for mine, (_, handle) in zip(found, monitors, strict=True):
        stock = handle.current()
        assert mine.info["sigmas"] == stock.info["sigmas"] and mine.info["seeds"] == [SEED, SEED + 1]
        for name, stats in stock.layers.items():
            assert torch.equal(mine.layers[name].input_sqmean, stats.input_sqmean), name
            assert torch.equal(mine.rows_of(name), stock.rows_of(name)), name
    (_, top), (bottom, _) = sigma_range(found[1]) or (0, 0), sigma_range(found[0]) or (0, 0)
    assert top < bottom and found[0].info["source_file"] == HIGH and found[1].info["source_file"] == LOW


def test_what_cannot_be_a_pair_is_refused(pack: dict[str, Any], pair: Any, digit: Any) -> None:
    with pytest.raises(Exception, match=r"switch_at_step 8 leaves one of the experts no step of 8"):
        calibrate(pack, *pair, digit, switch_at_step=STEPS)
    with pytest.raises(Exception, match="put the same shift on both"):
        calibrate(pack, pair[0], load(LOW, 8.0), digit)
    alone = calibrate(pack, pair[0], None, digit, samples=1)
    assert len(seen(alone.result[0].current())) == STEPS
    with pytest.raises(Exception, match="link low_noise_model to Calibrate"):
        alone.result[1].current()
    compare = {"model_a": pair[0], "model_b": pair[0], "conditioning": digit, "prompts": 1, "seeds": 1}
    with pytest.raises(Exception, match="link low_noise_a and low_noise_b"):
        execute(pack["CalibQuantCompare"], **compare, low_noise_a=pair[1], filename_prefix="x", **HOW)


def test_a_cancel_keeps_what_both_experts_saw(
    pack: dict[str, Any], pair: Any, digit: Any, comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    management, calls = importlib.import_module("comfy.model_management"), []

    def cancel(*_: Any) -> None:
        calls.append(1)
        if len(calls) == STEPS + SWITCH + 2:  # in the second sample's low-noise half
            raise management.InterruptProcessingException

    for model in pair:
        model.model.diffusion_model.register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        calibrate(pack, *pair, digit)
    folder = comfy / "output" / "calibrations" / "unfinished"
    kept = {path.name.rpartition("_")[0]: calibration.load(path) for path in folder.iterdir()}
    assert {name: len(found.info["runs"]) for name, found in kept.items()} == {
        "expert_high_noise_high_noise": 2,
        "expert_low_noise_low_noise": 1,
    }
    continued, whole = (calibrate(pack, *pair, digit) for _ in range(2))
    assert continued.ui.value == f"continued: 1 of 2 samples were done before\n{whole.ui.value}"
    for found, wanted in zip(continued.result, whole.result, strict=True):
        assert found.current().info["runs"] == wanted.current().info["runs"]
        for name, stats in wanted.current().layers.items():
            assert found.current().layers[name].count == stats.count
            torch.testing.assert_close(found.current().layers[name].input_sqmean, stats.input_sqmean)
    assert not list(folder.iterdir())


def test_sensitivities_of_an_expert_are_measured_where_it_draws(pack: dict[str, Any], pair: Any, digit: Any) -> None:
    node, visited = pack["CalibQuantSensitivity"], []
    inputs = {"conditioning": digit, "samples": 1, "points": 4, "probes": 1, "rows": 16, "seconds": 1, **HOW}
    inputs |= {"estimator": "gradient", "switch_at_step": SWITCH}
    _, low = calibrate(pack, *pair, digit, samples=1).result
    with pytest.raises(Exception, match=r"saw sigma 0\.8.* in 5 of these 8 steps: link both models of an expert pair"):
        execute(node, model=pair[1], calibration=low, **inputs)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            visited.append(float(args[1].max()) / 1000)

    for model in pair:
        model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    found = execute(node, model=pair[0], low_noise_model=pair[1], calibration=low, **inputs).result[0].current()
    assert len(found.sensitivities) == len(found.layers) and found.info["source_file"] == LOW
    assert visited and max(visited) <= max(seen(low.current())) * 1.001


def test_a_plan_is_refined_in_its_experts_place(pack: dict[str, Any], pair: Any, digit: Any) -> None:
    """Error of the pair's latent with the low-noise expert alone as planned: that of the file saved by this plan."""
    _, low = calibrate(pack, *pair, digit, samples=1).result
    words = {"strategy": "bits", "bits": 16.0, "gpu": "ampere", "formats": "nvfp4", "weighting": "auto"}
    words |= {"tie": False, "max_slow": 1.0}
    plan = execute(pack["CalibQuantPlan"], model_name=LOW, strategy=words, calibration=low).result[0]
    inputs = {"model": pair[0], "low_noise_model": pair[1], "conditioning": digit, "plan": plan, "samples": 1, **HOW}
    inputs |= {"switch_at_step": SWITCH, "minutes": 0.0, "measure_controls": False}
    (data,) = execute(pack["CalibQuantRefinePlan"], **inputs).ui["calibquant_refined"]
    save = {"model_name": LOW, "plan": plan, "calibration": low, "filename_prefix": "pair", "verify": False}
    name = execute(pack["CalibQuantQuantize"], **save).result[0]
    a, b = (two_samplers(pair[0], each, digit).double() for each in (pair[1], load(name)))
    assert data["before"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)


# --- compared


@pytest.fixture(scope="module")
def small(pack: dict[str, Any], comfy: Path) -> str:
    """The low-noise expert in NVFP4."""
    path = comfy / "models" / "diffusion_models" / "expert_low_nvfp4.safetensors"
    with Source(comfy / "models" / "diffusion_models" / LOW) as source:
        jobs.quantize(source, recipes.make_plan(source, "nvfp4"), path, rounding="nearest", overwrite=True)
    return path.name


def compare(pack: dict[str, Any], a: Any, b: Any, conditioning: Any, **words: Any) -> Any:
    inputs = {"model_a": a[0], "low_noise_a": a[1], "model_b": b[0], "low_noise_b": b[1], "conditioning": conditioning}
    inputs |= {"prompts": 1, "seeds": 2, "filename_prefix": "pair", "switch_at_step": SWITCH, **HOW}
    return execute(pack["CalibQuantCompare"], **inputs | words)


def test_a_pair_is_compared_as_two_samplers_draw_it(pack: dict[str, Any], pair: Any, digit: Any, small: str) -> None:
    other = (pair[0], load(small))
    (found,) = compare(pack, pair, other, digit).ui["calibquant_compare"]
    to_model = pair[0].get_model_object("latent_format").process_in
    for one, seed in zip(found["pictures"], (SEED, SEED + 1), strict=True):
        a, b = (to_model(two_samplers(*models, digit, seed)).double() for models in (pair, other))
        assert one["latent_error"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-4)
        assert one["latent_error"] > 1e-5
    errors = [step["error"] for step in found["steps"]]
    assert len(errors) == STEPS and max(errors[:SWITCH]) == 0 < min(errors[SWITCH:])
    assert found["source"] == f"{HIGH} + {LOW}" and found["output"] == f"{HIGH} + {small}"
    assert found["recipe"] == "nvfp4" and found["bytes_after"] < found["bytes_before"]
    assert found["pace"]["output"]["quantized"] == 60 and found["settings"]["switch at step"] == SWITCH


@pytest.fixture(scope="module")
def video_vae(pack: dict[str, Any]) -> Any:
    """ComfyUI's own decoder of Wan videos, narrow, with random weights: 9 frames of 3 latents."""
    vae, sd = importlib.import_module("comfy.ldm.wan.vae").WanVAE, importlib.import_module("comfy.sd").VAE
    words = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    state, generator = vae(**words, temperal_downsample=[False, True, True]).state_dict(), torch.Generator()
    for name, tensor in state.items():
        scale = 1 if tensor.dim() < 2 else max(1, tensor[0].numel()) ** -0.5
        state[name] = (
            torch.ones_like(tensor) if "gamma" in name else torch.randn(tensor.shape, generator=generator) * scale
        )
    return sd(sd=state)


def test_a_video_is_measured_in_all_frames(
    pack: dict[str, Any], pair: Any, digit: Any, small: str, video_vae: Any
) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    other = (pair[0], load(small))
    done = compare(pack, pair, other, digit, seeds=1, vae=video_vae)
    (one,) = done.ui["calibquant_compare"][0]["pictures"]
    with torch.inference_mode():
        a, b = (video_vae.decode(two_samplers(*each, digit))[0].double().clamp(0, 1).numpy() for each in (pair, other))
    assert a.shape == (5, 64, 64, 3)
    assert one["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=0.01)
    how = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "channel_axis": -1}
    each = [metrics.structural_similarity(x, y, **how) for x, y in zip(a, b, strict=True)]
    assert one["ssim"] == pytest.approx(np.mean(each), abs=1e-3)
    pixels = (done.result[0][0] * 255).round().byte().numpy()
    top = next(y for y in range(len(pixels)) if close(pixels, y, a[0]))
    for i, frame in enumerate((a[0], a[2], a[4])):
        assert close(pixels, top + i * (sheet.SMALLEST + sheet.GAP), frame), i


def close(pixels: np.ndarray, y: int, frame: np.ndarray) -> bool:
    """Whether the original's frame, 4 times as large, begins in this line of the sheet."""
    tile = pixels[y : y + sheet.SMALLEST : 4, sheet.EDGE : sheet.EDGE + sheet.SMALLEST : 4].astype(float)
    return tile.shape == frame.shape and np.abs(tile - 255 * frame).max() <= 1


def test_a_decoder_of_pictures_decodes_every_frame(pack: dict[str, Any], pair: Any, digit: Any, small: str) -> None:
    vae = pack["VAELoader"]().load_vae("calibquant_digits_vae.safetensors")[0]
    other = (pair[0], load(small))
    (one,) = compare(pack, pair, other, digit, seeds=1, vae=vae).ui["calibquant_compare"][0]["pictures"]
    with torch.inference_mode():
        drawn = [two_samplers(*each, digit).unbind(2) for each in (pair, other)]
        a, b = (torch.cat([vae.decode(frame) for frame in frames]).double().clamp(0, 1) for frames in drawn)
    assert a.shape == (2, 64, 64, 3)
    assert one["psnr"] == pytest.approx(-10 * float((a - b).square().mean().log10()), abs=0.01)


def test_a_decoder_that_makes_nan_is_named(pack: dict[str, Any]) -> None:
    comparing = sys.modules[pack["CalibQuantCompare"].__module__].comparing
    broken = SimpleNamespace(latent_dim=2, decode=lambda z: torch.full((1, 8, 8, 3), torch.nan))
    with pytest.raises(Exception, match="the linked VAE decodes to NaN"):
        comparing.decode(broken, torch.zeros(LATENT))


# --- the histogram


@pytest.mark.parametrize(
    ("sigmas", "first", "last"),
    [({"1": 2, "0.95": 2, "0.05": 1}, "sigma   0.9 - 1          4 ####", "sigma     0 - 0.1        1 ##########"),
     ({"14.6": 8, "0.03": 1}, "sigma     9 - inf        8 ####", "sigma     0 - 0.111      1 #####")],
)  # fmt: skip
def test_histograms_have_the_same_bins_for_one_kind_of_model(sigmas: dict[str, int], first: str, last: str) -> None:
    lines = histogram(Calibration(info={"sigmas": sigmas}))
    assert len(lines) == 10 and lines[0].startswith(first) and lines[-1] == last
    assert histogram(Calibration()) == [] and sigma_range(Calibration()) is None
