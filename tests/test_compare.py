"""Comparing two models' samples: the figures against independent ones, the sentence, and the node in ComfyUI."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from comfy_env import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import likeness
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.reports import likeness as reports
from quant_core.reports import sheet
from quant_core.reports.likeness import Comparison, Likeness, Pace, Picture
from quant_core.reports.report import Report

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
STEPS, SEED = 4, 1000
metrics = pytest.importorskip("skimage.metrics")


# --- the arithmetic


def pictures(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(11, 40), st.integers(11, 40), st.floats(0, 1))
def test_psnr_and_ssim_are_scikit_images(seed: int, frames: int, height: int, width: int, far: float) -> None:
    wanted = pictures(seed, frames, height, width, 3)
    found = torch.lerp(wanted, pictures(seed + 1, frames, height, width, 3), far)
    a, b = wanted.double().numpy(), found.double().numpy()
    if (a == b).all():
        assert likeness.psnr(found, wanted) == likeness.MOST_DB
    else:
        expected = metrics.peak_signal_noise_ratio(a, b, data_range=1.0)
        assert likeness.psnr(found, wanted) == pytest.approx(min(expected, 100), abs=1e-6)
    how = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}
    pairs = [(x[..., c], y[..., c]) for x, y in zip(a, b, strict=True) for c in range(3)]
    each = [metrics.structural_similarity(*pair, **how) for pair in pairs]
    assert likeness.ssim(found, wanted) == pytest.approx(np.mean(each), abs=1e-5)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-2, 2))
def test_relative_error_of_a_scaled_copy(values: list[float], share: float) -> None:
    wanted = torch.tensor([*values, 1.0], dtype=torch.float64)
    assert likeness.relative_error(wanted * (1 + share), wanted) == pytest.approx(share**2, abs=1e-9)
    assert likeness.relative_error(wanted, wanted) == 0


@pytest.mark.parametrize("n", [2, 5, 40])
def test_the_interval_is_scipys_percentile_bootstrap(n: int) -> None:
    values = np.random.default_rng(n).exponential(size=n)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    low, high = likeness.interval(list(values)) or (0, 0)
    assert low == pytest.approx(expected.low, rel=0.05) and high == pytest.approx(expected.high, rel=0.05)
    assert likeness.interval([3.0]) is None


def test_a_summary_knows_which_end_is_worst() -> None:
    assert (likeness.summarize([1, 2, 6]) or 0).worst == 6
    found = likeness.summarize([1, 2, 6], larger_is_worse=False)
    assert found is not None and (found.mean, found.worst, found.n) == (3, 1, 3)
    assert likeness.summarize([]) is None


def test_lpips_is_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(likeness.importlib.util, "find_spec", lambda name: None)
    assert likeness.lpips() == (None, "the package lpips is not installed")
    monkeypatch.setattr(likeness.importlib.util, "find_spec", lambda name: name)
    torchvision = ModuleType("torchvision.models")
    torchvision.AlexNet_Weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://host/a/alexnet-1.pth"))
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    package = ModuleType("lpips")
    package.LPIPS = lambda net, verbose: lambda a, b: (a - b).abs().amax()
    monkeypatch.setitem(sys.modules, "lpips", package)
    none, why = likeness.lpips()
    assert none is None and "alexnet-1.pth" in why and "nothing is downloaded" in why
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-1.pth").touch()
    distance, _ = likeness.lpips()
    assert distance is not None
    assert distance(torch.zeros(2, 8, 8, 3), torch.ones(2, 8, 8, 3)) == 2  # LPIPS takes -1..1


# --- the sentence


def comparison(*errors: float, other: float = 1.0, again: float = 0.0, ssim: float | None = None) -> Comparison:
    shown = [Picture(error, ssim=ssim, number=i + 1) for i, error in enumerate(errors)]
    return Comparison("", "", "", "", 0, 0, pictures=shown, same_seed=[Likeness(again)], other_seed=[Likeness(other)])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (1e-3, "Practically the same as the original: 32× closer than another seed"),
        (1.1e-3, "Close to the original: 30× closer"),
        (1e-2, "Close to the original: 10× closer"),
        (1.1e-2, "Visibly different from the original: 9.5× closer than another seed: use more bits, or calibrate"),
        (0.1, "Visibly different from the original: 3.2× closer"),
        (0.11, "Another picture than the original's: 3.0× closer than another seed: use more bits"),
    ],
)
def test_the_verdict_has_its_documented_thresholds(error: float, words: str) -> None:
    for other in (1.0, 4.0):  # a share of what another seed makes
        said = comparison(error * other, other=other).verdict()
        assert said.startswith(words) and ("use more bits" in said) is (error > 1e-2)


def test_the_verdict_names_the_worst_picture() -> None:
    assert comparison(1e-4, 3e-4, 2e-4, ssim=0.998).verdict() == (
        "Practically the same as the original: 71× closer than another seed, mean SSIM 0.998; the worst picture is #2."
    )
    said = comparison(1e-4, 1e-4, 0.02).verdict()
    assert said.startswith("Close") and said.endswith("; but 1 of 3 pictures visibly different: look at #3.")
    said = comparison(0.02, 0.03).verdict()
    assert said.endswith("the worst picture is #2: use more bits, or calibrate and round with GPTQ.")


def test_the_verdict_tells_no_difference_from_noise() -> None:
    assert comparison(0.0, 0.0).verdict().startswith("The same: all 2 latents are identical")
    assert "is to itself" in comparison(2e-3, again=1e-3).verdict()
    assert "is to itself" not in comparison(2.1e-3, again=1e-3).verdict()


def test_reports_share_their_words_and_are_plain_json() -> None:
    found = replace(
        comparison(0.01, 0.02), source="a", pace={"source": Pace(1.0), "output": Pace(0.5, 3, 1, {"why": 2})}
    )
    read = json.loads(found.to_json())
    shared = {"source", "output", "architecture", "recipe", "bytes_before", "bytes_after", "seconds"}
    assert shared <= read.keys() and shared <= {field.name for field in fields(Report)}
    assert read["latent_error"]["mean"] == pytest.approx(0.015) and read["psnr"] is None
    assert read["pictures"][1]["latent_error"] == 0.02 and read["verdict"] == found.verdict()
    for text in (found.summary(), found.to_markdown("x.png")):
        assert "(2.00× the speed)" in text and "native kernel: 1 of 3 quantized layers; 2: why" in text
        assert "only 2 pictures" in text


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    taken = tmp_path / "c.json"
    taken.write_text("other")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibQuantError):
        reports.save({tmp_path / "a.png": b"1", tmp_path / "gone" / "b.md": b"2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "folder"]
    reports.save({tmp_path / "a.png": b"1", tmp_path / "b.md": b"2"})
    assert (tmp_path / "b.md").read_bytes() == b"2"


# --- the sheet


def test_the_sheet_shows_pixels_as_they_are_and_the_difference_with_its_gain() -> None:
    wanted = torch.full((1, 32, 48, 3), 0.5)
    found = wanted.clone()
    found[0, 4, 5] += 0.1
    a, b, difference = (np.asarray(tile) for tile in sheet.tiles(wanted, found))
    assert a.shape == (32 * 5, 48 * 5, 3)  # 256 // 48
    assert (a == 128).all() and (b[20:25, 25:30] == 153).all()
    assert (difference[20:25, 25:30] == round(255 * 0.1 * sheet.GAIN)).all() and difference.sum() == 25 * 3 * 204
    large = sheet.tiles(torch.zeros(3, 40, 2000, 3), torch.zeros(3, 40, 2000, 3))[0]
    assert large.size == (512, 3 * 10 + 2 * sheet.GAP)  # three frames


def test_a_sheet_of_many_shows_the_worst_in_order() -> None:
    errors = [0.0] * 30
    for i, place in enumerate([29, 3, 17, 5, 11, 2, 8, 23, 1]):
        errors[place] = 1.0 - i / 10
    assert sheet.chosen(errors) == [2, 3, 5, 8, 11, 17, 23, 29]
    assert sheet.chosen([0.1, 0.0]) == [0, 1]


@pytest.mark.parametrize("fonts", [sheet.FONTS, ()])
def test_a_sheet_takes_any_words(fonts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "FONTS", fonts)
    tiles = sheet.tiles(torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64, 3))
    rows = [sheet.Row(tiles, ("#1 · seed 1 × 2", "犬 " * 400)), sheet.Row(tiles, ("#2",))]
    drawn = sheet.draw(rows, "verdict " * 30, ("a" * 300, "b", "c"), "settings")
    assert drawn.width == 3 * 256 + 2 * sheet.GAP + 2 * sheet.EDGE and drawn.height > 2 * 256
    assert Image.open(io.BytesIO(sheet.png(drawn))).size == drawn.size


# --- in ComfyUI


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Iterator[dict[str, Any]]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    yield nodes.NODE_CLASS_MAPPINGS
    shutil.rmtree(comfy / "output" / "comparisons", ignore_errors=True)


def load(name: str) -> Any:
    with torch.inference_mode():
        return importlib.import_module("nodes").UNETLoader().load_unet(name, "default")[0]


@pytest.fixture(scope="module")
def digits(pack: dict[str, Any]) -> Any:
    return execute(pack["CalibQuantLoadPromptSet"], prompt_set="digits.safetensors", index=0).result[0]


@pytest.fixture(scope="module")
def small(pack: dict[str, Any], comfy: Path) -> str:
    """The demo model in NVFP4, where the stock loader finds it."""
    path = comfy / "models" / "diffusion_models" / "compare_nvfp4.safetensors"
    with Source(DEMO) as source:
        jobs.quantize(source, recipes.make_plan(source, "nvfp4"), path, rounding="nearest")
    return path.name


def execute(node: Any, **inputs: Any) -> Any:
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def compare(pack: dict[str, Any], a: Any, b: Any, conditioning: Any, prefix: str = "test", **words: Any) -> Any:
    order = {"prompts": 2, "seeds": 2, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    order |= {"width": 64, "height": 64, "frames": 1, "seed": SEED, "filename_prefix": prefix, **words}
    return execute(pack["CalibQuantCompare"], model_a=a, model_b=b, conditioning=conditioning, **order)


def data(done: Any) -> dict[str, Any]:
    return done.ui["calibquant_compare"][0]


def ksampler(model: Any, positive: Any, seed: int, **how: Any) -> torch.Tensor:
    sample, latent = importlib.import_module("comfy.sample"), torch.zeros(1, 16, 1, 8, 8)
    with torch.inference_mode():
        noise = sample.prepare_noise(latent, seed)
        words = (how.pop("steps", STEPS), 1.0, "euler", "simple", positive, positive, latent)
        return sample.sample(model, noise, *words, seed=seed, disable_pbar=True, **how)


@pytest.mark.core
def test_identical_models_are_the_same(pack: dict[str, Any], digits: Any, comfy: Path) -> None:
    done = compare(pack, load(MODEL), load(MODEL), digits, prefix="same/m")
    found = data(done)
    assert found["verdict"].startswith("The same: all 4 latents")
    assert found["latent_error"]["worst"] == 0 and found["same_seed"][0]["latent_error"] == 0
    assert [step["error"] for step in found["steps"]] == [0.0] * STEPS
    assert [one["latent_error"] > 0.1 for one in found["other_seed"]] == [True, True]
    assert [(one["seed"], one["prompt"]) for one in found["pictures"][1:3]] == [(1001, "0"), (1000, "1")]
    folder = comfy / "output" / "comparisons" / "same"
    assert sorted(path.name for path in folder.iterdir()) == [f"m_00001_.{end}" for end in ("json", "md", "png")]
    assert "PSNR, dB: not measured: no VAE is linked" in done.ui["text"][0]
    assert done.result[0].shape[0] == 1 and done.result[0].max() <= 1


@pytest.mark.core
def test_figures_are_those_of_stock_sampling(pack: dict[str, Any], digits: Any, small: str) -> None:
    first, second = load(MODEL), load(small)
    found = data(compare(pack, first, second, digits))
    latent_format = first.get_model_object("latent_format")
    errors = []
    for prompt in digits[:2]:
        for seed in (SEED, SEED + 1):
            a, b = (
                latent_format.process_in(ksampler(model, [[prompt["cond"], {}]], seed)) for model in (first, second)
            )
            errors.append((np.linalg.norm((a - b).numpy()) / np.linalg.norm(a.numpy())) ** 2)
    assert [one["latent_error"] for one in found["pictures"]] == pytest.approx(errors, rel=1e-4)
    assert min(errors) > 1e-4
    native = found["pace"]["output"]
    assert (native["quantized"], found["pace"]["source"]["quantized"]) == (60, 0)
    assert native["native"] + sum(native["emulated"].values()) == 60
    if not torch.cuda.is_available():
        assert native["native"] == 0 and "no GPU" in next(iter(native["emulated"]))


@pytest.mark.core
def test_steps_are_compared_at_the_originals_inputs(pack: dict[str, Any], digits: Any, small: str) -> None:
    """Against both models' raw outputs v at the latents that the stock sampler hands to its callback."""
    first, second = load(MODEL), load(small)
    found = data(compare(pack, first, second, digits, prompts=1, seeds=1))
    positive, seen = [[digits[0]["cond"], {}]], []
    ksampler(first, positive, SEED, callback=lambda i, x0, x, n: seen.append((x.clone(), x0.clone())))
    sampling = first.get_model_object("model_sampling")
    sigmas = importlib.import_module("comfy.samplers").calculate_sigmas(sampling, "simple", STEPS)
    assert [step["sigma"] for step in found["steps"]] == pytest.approx(sigmas[:-1].tolist(), rel=1e-5)
    for step, sigma, (x, x0) in zip(found["steps"], sigmas[:-1], seen, strict=True):
        with torch.inference_mode():
            a, b = (
                model.model.diffusion_model(x, sampling.timestep(sigma).float()[None], context=digits[0]["cond"])
                for model in (first, second)
            )
        assert torch.allclose(x - sigma * a, x0, atol=1e-4)
        expected = ((a - b).square().sum() / a.square().sum()).item()
        assert step["error"] == pytest.approx(expected, rel=1e-2) and step["n"] == 1


@pytest.mark.core
def test_one_seed_still_has_another_to_be_read_by(pack: dict[str, Any], digits: Any) -> None:
    model = load(MODEL)
    found = data(compare(pack, model, model, [[digits[3]["cond"], {}]], seeds=1))
    assert len(found["pictures"]) == len(found["other_seed"]) == 1
    a, b = (
        model.get_model_object("latent_format").process_in(ksampler(model, [[digits[3]["cond"], {}]], seed))
        for seed in (SEED, SEED + 1)
    )
    expected = ((a - b).square().sum() / a.square().sum()).item()
    assert found["other_seed"][0]["latent_error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.core
def test_what_is_kept_of_the_originals_way_is_bounded(
    pack: dict[str, Any], digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparing = sys.modules[pack["CalibQuantCompare"].__module__].comparing
    assert {step["n"] for step in data(compare(pack, load(MODEL), load(MODEL), digits, seeds=1))["steps"]} == {2}
    monkeypatch.setattr(comparing, "KEPT", 1)
    assert {step["n"] for step in data(compare(pack, load(MODEL), load(MODEL), digits, seeds=1))["steps"]} == {1}


@pytest.mark.core
def test_a_pair_that_cannot_be_compared_is_refused(pack: dict[str, Any], digits: Any, small: str) -> None:
    first, second = load(MODEL), load(small)
    shift = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingSD3
    shifted = shift().patch(second, 9.0)[0]
    with pytest.raises(Exception, match="put the same shift on both"):
        compare(pack, first, shifted, digits)
    second.model.latent_format = importlib.import_module("comfy.latent_formats").Flux()
    with pytest.raises(Exception, match=r"make different latents \(Wan21, Flux\)"):
        compare(pack, first, second, digits)
    with pytest.raises(Exception, match="needs a negative prompt"):
        compare(pack, first, first, digits, cfg=2.0)


@pytest.mark.core
def test_a_model_that_draws_nan_is_named(pack: dict[str, Any], digits: Any) -> None:
    broken = load(MODEL)
    broken.model.diffusion_model.head.head.bias.data.fill_(float("nan"))
    with pytest.raises(Exception, match="model_b draws NaN at seed 1000"):
        compare(pack, load(MODEL), broken, digits)


@pytest.mark.core
def test_cancel_leaves_nothing_behind(pack: dict[str, Any], digits: Any, comfy: Path, monkeypatch: Any) -> None:
    management, asked = importlib.import_module("comfy.model_management"), []

    def cancel() -> None:
        asked.append(1)
        if len(asked) > 3 * STEPS:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel)
    model = load(MODEL)
    with pytest.raises(management.InterruptProcessingException):
        compare(pack, model, model, digits, prefix="cancelled/m")
    assert not list((comfy / "output" / "comparisons" / "cancelled").iterdir())
    assert not sum(len(module._forward_pre_hooks) for module in model.model.diffusion_model.modules())


@pytest.mark.core
def test_pictures_are_measured_as_the_stock_decoder_makes_them(pack: dict[str, Any], digits: Any, small: str) -> None:
    """In 8 bits, as anybody measures saved files: rounding to them moves a PSNR of 35 dB by hundredths."""
    first, second = load(MODEL), load(small)
    vae = pack["VAELoader"]().load_vae("calibquant_digits_vae.safetensors")[0]
    done = compare(pack, first, second, digits, seeds=1, vae=vae)
    drawn = []
    for prompt in digits[:2]:
        for model in (first, second):
            final = ksampler(model, [[prompt["cond"], {}]], SEED)
            (image,) = pack["VAEDecode"]().decode(vae, {"samples": final})
            drawn.append((image[0] * 255).clamp(0, 255).round().byte().numpy())
    how = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "channel_axis": -1}
    for i, one in enumerate(data(done)["pictures"]):
        a, b = drawn[2 * i : 2 * i + 2]
        assert one["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=0.2)
        assert one["ssim"] == pytest.approx(metrics.structural_similarity(a, b, **how), abs=0.005)
        assert 15 < one["psnr"] < 60
    pixels = (done.result[0][0] * 255).round().byte().numpy()
    size, times = drawn[0].shape[0], sheet.SMALLEST // drawn[0].shape[0]
    assert any(
        np.abs(tile[::times, ::times].astype(int) - drawn[0]).max() <= 1 for tile in _tiles(pixels, size * times)
    )


def _tiles(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Every square of the sheet where an original may stand."""
    for y in range(len(pixels) - size):
        yield pixels[y : y + size, sheet.EDGE : sheet.EDGE + size]


@pytest.mark.core
def test_layers_without_a_kernel_say_why(pack: dict[str, Any]) -> None:
    comparing = sys.modules[pack["CalibQuantCompare"].__module__].comparing

    class Quantized(torch.nn.Linear):
        layout_type, quant_format, weight_function, bias_function = "layout", "nvfp4", [], []
        _full_precision_mm = _full_precision_mm_config = fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                logging.getLogger("comfy_kitchen.tensor.nvfp4").warning("NVFP4 mm failed: why\nmore")
            return super().forward(x)

    model = torch.nn.Sequential(
        *(Quantized(4, 4, device="meta") for _ in range(5)), torch.nn.Linear(4, 4, device="meta")
    )
    model[1].fails = True
    model[2]._full_precision_mm = True
    model[3]._full_precision_mm = model[3]._full_precision_mm_config = True
    model[4].weight_function = [None]
    layers: dict[str, str] = {}
    with comparing._watch_kernels(model, layers):
        model(torch.zeros(2, 4, device="meta"))
    assert layers.pop("0") == "" and layers.keys() == {"1", "2", "3", "4"}
    words = ("kernel failed (NVFP4 mm failed: why)", "no kernel for nvfp4", "weight-only", "a LoRA")
    assert all(word in why for word, why in zip(words, layers.values(), strict=True)), layers
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not logging.getLogger("comfy_kitchen").handlers


@pytest.mark.core
def test_prompts_come_from_a_file(pack: dict[str, Any], comfy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = comfy / "input" / "protocol.txt"
    path.write_text("# a comment\nfirst\n\n  second \n", "utf-8")
    node, told = pack["CalibQuantPromptSet"], []
    clip = SimpleNamespace(
        tokenize=lambda text: told.append(text), encode_from_tokens_scheduled=lambda _: [[torch.ones(1, 2, 4), {}]]
    )
    execute(node, clip=clip, prompts="not these", name="from_file", file="protocol.txt")
    assert told == ["first", "second"]
    path.write_text("\n# nothing\n", "utf-8")
    with pytest.raises(Exception, match=r"has no prompts: write one a line \(protocol\.txt\)"):
        execute(node, clip=clip, prompts="", name="from_file", file="protocol.txt")
    with pytest.raises(Exception, match=r"there is no file \.\./x\.txt"):
        execute(node, clip=clip, prompts="", name="from_file", file="../x.txt")
    (comfy / "output" / "promptsets" / "from_file.safetensors").unlink()
    path.unlink()


# --- through a real server


@pytest.mark.core
def test_the_workflow_compares_what_it_saved(server: Server) -> None:
    graph = json.loads((models.ROOT / "workflows" / "api" / "quantize_and_compare.json").read_text("utf-8"))
    (node,) = (name for name, one in graph.items() if one["class_type"] == "CalibQuantCompare")
    graph[node]["inputs"] |= {"prompts": 2, "steps": STEPS}
    output = server.post(graph)["outputs"][node]
    (found,), (text,) = output["calibquant_compare"], output["text"]
    assert text.splitlines()[0] == found["verdict"] and "saved as output/comparisons/digits_00001_.md" in text
    assert (found["source"], found["recipe"], found["architecture"]) == (MODEL, "bits 5.5", "wan")
    saved = server.output_dir / "diffusion_models" / "calibquant" / found["output"]
    assert (found["bytes_before"], found["bytes_after"]) == (DEMO.stat().st_size, saved.stat().st_size)
    folder = server.output_dir / "comparisons"
    assert json.loads((folder / "digits_00001_.json").read_text("utf-8")) == found
    page = (folder / "digits_00001_.md").read_text("utf-8")
    assert "![both models, row by row](digits_00001_.png)" in page and found["verdict"] in page
    assert output["images"] == [{"filename": "digits_00001_.png", "subfolder": "comparisons", "type": "output"}]
    with Image.open(folder / "digits_00001_.png") as picture:
        assert picture.width == 3 * 256 + 2 * sheet.GAP + 2 * sheet.EDGE
    server.post(graph)
    assert len(list(folder.glob("digits_0*"))) == 3  # nothing changed: nothing is drawn again
    (folder / "digits_00001_.png").unlink()
    server.post(graph)
    assert (folder / "digits_00002_.png").exists()


@pytest.mark.core
def test_every_input_and_output_is_explained(pack: dict[str, Any]) -> None:
    schema = pack["CalibQuantCompare"].GET_SCHEMA()
    page = (models.ROOT / "js" / "docs" / "CalibQuantCompare.md").read_text("utf-8")
    for entry in [*schema.inputs, *schema.outputs]:
        name = entry.display_name or entry.id if entry in schema.outputs else entry.id
        assert entry.tooltip and len(entry.tooltip) > 10 and f"**{name}**" in page, name
    for heading in ("## Inputs", "## Output", "## Example", "## What goes wrong"):
        assert heading in page
